"""A student beside its teacher on held-out text: bits per byte, retention, boundaries, next bytes, anchors."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megabyte_distill.data.packing import PackedRow
from megabyte_distill.data.progress import Show, counted, silent
from megabyte_distill.data.text_mask import text_positions
from megabyte_distill.data.token_bytes import TokenBytes
from megabyte_distill.evaluation.bootstrap import Bootstrap, Counts, Interval
from megabyte_distill.evaluation.document_counts import Bits, Judged, count_rows
from megabyte_distill.evaluation.held_out import openings
from megabyte_distill.evaluation.thresholds import ThresholdFigures, sweep
from megabyte_distill.inference.bit_paths import device_of
from megabyte_distill.inference.scoring import score_paths, score_row, score_tokens, segment_texts
from megabyte_distill.inference.tokenizations import score_tokenizations
from megabyte_distill.model.backbone import Backbone
from megabyte_distill.model.student import Student
from megabyte_distill.objectives.alignment import table_variance
from megabyte_distill.objectives.byte_tree import ByteTree

_OPTIONAL = (
    *("unigram_bits_per_byte", "teacher_next_byte_accuracy", "teacher_exact_bits_per_byte"),
    *("official_bits_per_byte", "official_retention", "merged_bits_per_byte"),
)
"""Figures that are None where what they need was not given."""
NO_TEXT = "the rows hold not one byte of text; evaluate on documents that are not empty"


@dataclass(frozen=True, slots=True, kw_only=True)
class PathFigures:
    """Scores without a tokenizer, and the others on the same text; bits per byte."""

    paths: int
    text_bytes: int
    bits_per_byte: float
    """Summed probability of the paths that survived: an upper bound."""
    filter_bits_per_byte: float
    """The causal byte model that stock tools see."""
    gold_bits_per_byte: float
    """The student under gold bits."""
    teacher_bits_per_byte: float
    """Its own tokens."""
    tokenizations: int
    teacher_tokenizations_bits_per_byte: float | None
    """The teacher's summed probability of so many tokenizations, its own among them, as the beginning of a longer text:
    what compares with ``bits_per_byte``. None where not asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """All figures on some text. Bits per byte leave out the event "the document ends"."""

    text_bytes: int
    documents: int
    is_bound: bool
    """False in official dechunk, which reads p and so the next byte: the student's figures then credit a leak."""
    bits: Bits
    """What ``student_bits_per_byte``, ``retention``, ``gap_bits_per_byte`` and ``next_byte_accuracy`` are under."""
    teacher_bits_per_byte: float
    """Of the teacher's canonical tokens."""
    teacher_exact_bits_per_byte: float | None
    """Of the same tokens under its exact distribution over (byte, bit) pairs, which leaves out ids that cannot be text;
    None where no token table was given."""
    student_bits_per_byte: float
    """Joint, bits as input and label. Under gold bits the same quantity as the teacher's."""
    retention: float
    """Teacher's over student's."""
    gap_bits_per_byte: float
    """Student's minus teacher's."""
    gold_bits_per_byte: float
    """Joint, gold bits."""
    router_bits_per_byte: float
    """Joint, the router's bits."""
    merged_bits_per_byte: float | None
    """Joint, the ends that the student's stage kept; None where it kept all, also below."""
    official_bits_per_byte: float | None
    """The paper's score, no bound: it sees the next byte through the boundaries and takes the likelier of two bits.
    None where not asked for."""
    official_retention: float | None
    stage1_bits_per_byte: float
    """Gold chunks of bytes through encoder, backbone and token head."""
    stage1_retention: float
    next_byte_accuracy: float
    """Share of bytes that the student gave the highest probability, its two bits summed."""
    teacher_next_byte_accuracy: float | None
    """The same of the teacher's exact byte distribution behind the gold tokens; None where no token table was given."""
    boundary_precision: float
    """Of the router's ends, against the merged ones where there are any and the teacher's tokens' elsewhere."""
    boundary_recall: float
    boundary_f1: float
    bytes_per_chunk: float
    """Of those that the router's are judged by."""
    router_bytes_per_chunk: float
    alignment_mse_relative: float
    """Squared error of encoder states against token embeddings over the embedding table's variance."""
    teacher_bits_per_document_end: float | None
    """None where no document ends in the text."""
    student_bits_per_document_end: float | None
    constant_embedding_bits_per_byte: float
    """Anchor: the teacher with every embedding replaced by the table's mean."""
    unigram_bits_per_byte: float | None
    """Anchor: tokens by their frequency in the training text; None where that was not given."""
    paths: PathFigures | None
    intervals: Mapping[str, Interval] = field(default_factory=dict)
    """Name of a figure → its confidence interval over documents."""

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return {**asdict(self), "intervals": {name: list(ends) for name, ends in self.intervals.items()}}


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Figures of all text together, and of each data set."""

    total: Evaluation
    sets: Mapping[str, Evaluation]
    thresholds: Sequence[ThresholdFigures] = ()
    """Of all text; empty where not asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measures:
    """What is measured, and how."""

    bits: Bits = Bits.GOLD
    """Of the student's headline figures."""
    official: bool = False
    """The paper's score as well."""
    paths: int = 4
    """K of the figures without a tokenizer; 0 leaves them out, as does official mode, which cannot step."""
    path_bytes: int = 20_000
    """About how much text those are taken over, shared evenly by the sets: the openings of evenly spread rows."""
    tokenizations: int = 0
    """The teacher over so many tokenizations, on the same text; needs its token table. 0 leaves it out."""
    threshold: float = 0.5
    """Above which the router's p ends a chunk."""
    thresholds: Sequence[float] = ()
    """Several of them, for a table of quality against backbone steps."""
    merge_limit: float | None = None
    """What the student's stage merged tokens with at its end; None where it did not."""
    bootstrap: Bootstrap = field(default_factory=Bootstrap)
    """How the intervals are made."""


def headline_bits(merge_limit: float | None) -> Bits:
    """Those that a student learned to write, whose stage merged tokens with a limit or did not."""
    return Bits.GOLD if merge_limit is None else Bits.MERGED


def evaluate_run(
    student: Student,
    teacher: Backbone,
    rows: Sequence[PackedRow],
    *,
    stage1_student: Student | None = None,
    aligned_student: Student | None = None,
    unigram: Tensor | None = None,
    paths: int = 4,
    path_bytes: int = 20_000,
    merge_limit: float | None = None,
    show: Show = silent,
) -> Evaluation:
    """All figures on the given rows of one data set (``held_out.held_out_rows``), without intervals.

    See :func:`compare`; the headline is under gold bits, or merged ones where ``merge_limit`` says how.
    """
    measures = Measures(
        bits=headline_bits(merge_limit),
        paths=paths,
        path_bytes=path_bytes,
        merge_limit=merge_limit,
        bootstrap=Bootstrap(resamples=0),
    )
    found = compare(
        student,
        teacher,
        {"": rows},
        measures,
        stage1_student=stage1_student,
        aligned_student=aligned_student,
        unigram=unigram,
        show=show,
    )
    return found.total


@torch.no_grad()
def compare(
    student: Student,
    teacher: Backbone,
    rows_of_set: Mapping[str, Sequence[PackedRow]],
    measures: Measures,
    *,
    stage1_student: Student | None = None,
    aligned_student: Student | None = None,
    unigram: Tensor | None = None,
    token_bytes: TokenBytes | None = None,
    show: Show = silent,
) -> Comparison:
    """Every figure, of each data set and of all together. ValueError for a set without text.

    Args:
        student: after 2a or 2b; an earlier one gives bits per byte of an untrained decoder.
        teacher: what it was distilled from.
        rows_of_set: by the sets' names; on the student's device or not.
        measures: what is asked for.
        stage1_student: the student after 1b, for the figures of the token head. 2b trains the
            backbone on, and the token head no longer fits exactly. Default: ``student``.
        aligned_student: the student after 1a, for the alignment error. Default: ``stage1_student``.
        unigram: ``anchors.unigram_nll`` [W] of the training text, for the anchor.
        token_bytes: the teacher's vocabulary, for its next-byte accuracy and its other tokenizations.
        show: displays how far each pass over the text is.
    """
    distilled = stage1_student or student
    judged = Judged(
        student=student,
        teacher=teacher,
        distilled=distilled,
        aligned=aligned_student or distilled,
        unigram=unigram,
        tree=None if token_bytes is None else ByteTree.of(token_bytes),
        bits=measures.bits,
        merge_limit=measures.merge_limit,
        official=measures.official,
        threshold=measures.threshold,
    )
    size = sum(map(_row_bytes, itertools.chain(*rows_of_set.values())))
    with closing(show("held-out text", size)) as done:
        counts = {name: count_rows(judged, counted(rows, done, _row_bytes)) for name, rows in rows_of_set.items()}
    tables = list(counts.values())
    together = {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}
    by_path = {}
    if measures.paths and not student.is_official:
        share = replace(measures, path_bytes=-(-measures.path_bytes // len(rows_of_set)))
        by_path = {name: _path_figures(judged, rows, share, token_bytes, show) for name, rows in rows_of_set.items()}
    make = partial(_evaluation, judged, measures)
    return Comparison(
        total=make(together, _all_paths(list(by_path.values()))),
        sets={name: make(table, by_path.get(name)) for name, table in counts.items()},
        thresholds=_thresholds(student, rows_of_set, measures, show),
    )


def _thresholds(
    student: Student, rows_of_set: Mapping[str, Sequence[PackedRow]], measures: Measures, show: Show
) -> list[ThresholdFigures]:
    if not measures.thresholds:
        return []
    rows = [row for of_set in rows_of_set.values() for row in of_set]
    with closing(show("thresholds", sum(map(_row_bytes, rows)))) as done:
        return sweep(student, counted(rows, done, _row_bytes), measures.thresholds, measures.merge_limit)


def _row_bytes(row: PackedRow) -> int:
    return int(text_positions(row).sum())


def _path_figures(
    judged: Judged, rows: Sequence[PackedRow], measures: Measures, token_bytes: TokenBytes | None, show: Show
) -> PathFigures:
    """The student along K paths, and gold bits and the teacher on the same text. ValueError where there is none."""
    student, teacher = judged.student, judged.teacher
    device = device_of(student)
    gold = tokens = 0.0
    texts: list[Tensor] = []
    canonical: list[list[int]] = []
    for row in (row.to(device) for row in openings(rows, measures.path_bytes)):
        gold += float(score_row(student, row).bits.sum())
        tokens += float(score_tokens(teacher, row).bits.sum())
        texts += segment_texts(row)
        canonical.append(row.tokens[1:].tolist())  # an opening is one segment
    size = sum(text.shape[0] for text in texts)
    if not size:
        raise ValueError(NO_TEXT)
    with closing(show(f"{measures.paths} bit histories", size)) as done:
        score = score_paths(student, texts, paths=measures.paths, done=done)
    over_tokenizations = None
    if measures.tokenizations and token_bytes is not None:
        with closing(show(f"{measures.tokenizations} tokenizations", size)) as done:
            summed = score_tokenizations(
                teacher, token_bytes, texts, paths=measures.tokenizations, canonical=canonical, done=done
            )
        over_tokenizations = float(summed.prefix_bits.sum()) / size
    return PathFigures(
        paths=measures.paths,
        text_bytes=size,
        bits_per_byte=float(score.bits.sum()) / size,
        filter_bits_per_byte=float(score.filter_bits.sum()) / size,
        gold_bits_per_byte=gold / size,
        teacher_bits_per_byte=tokens / size,
        tokenizations=measures.tokenizations,
        teacher_tokenizations_bits_per_byte=over_tokenizations,
    )


def _all_paths(parts: Sequence[PathFigures]) -> PathFigures | None:
    """Figures of all their text together."""
    if not parts:
        return None
    size = sum(part.text_bytes for part in parts)

    def mean(name: str) -> float:
        return float(sum(getattr(part, name) * part.text_bytes for part in parts)) / size

    every = parts[0].teacher_tokenizations_bits_per_byte is not None
    return PathFigures(
        paths=parts[0].paths,
        text_bytes=size,
        tokenizations=parts[0].tokenizations,
        teacher_tokenizations_bits_per_byte=mean("teacher_tokenizations_bits_per_byte") if every else None,
        bits_per_byte=mean("bits_per_byte"),
        filter_bits_per_byte=mean("filter_bits_per_byte"),
        gold_bits_per_byte=mean("gold_bits_per_byte"),
        teacher_bits_per_byte=mean("teacher_bits_per_byte"),
    )


def _evaluation(judged: Judged, measures: Measures, table: Counts, paths: PathFigures | None) -> Evaluation:
    """The figures of some documents, from the counts of each."""
    variance = float(table_variance(judged.teacher.embedding_table, judged.teacher.columns))
    figures = partial(_figures, bits=measures.bits, variance=variance)
    sums = {name: values.sum(keepdims=True) for name, values in table.items()}
    if not sums["text_bytes"][0]:
        raise ValueError(NO_TEXT)
    values: dict[str, Any] = {name: float(value[0]) for name, value in figures(sums).items()}
    for name in ("teacher_bits_per_document_end", "student_bits_per_document_end"):
        values[name] = values[name] if sums["ends"][0] else None
    return Evaluation(
        text_bytes=int(sums["text_bytes"][0]),
        documents=len(table["text_bytes"]),
        is_bound=not judged.student.is_official,
        bits=measures.bits,
        paths=paths,
        intervals=measures.bootstrap.intervals(table, figures),
        **{**dict.fromkeys(_OPTIONAL), **values},
    )


def _figures(sums: Counts, *, bits: Bits, variance: float) -> dict[str, NDArray[np.float64]]:
    """Every figure that is a function of counts, by its name in :class:`Evaluation`; all arrays are of one length."""
    size, teacher, stage1 = sums["text_bytes"], sums["teacher_bits"], sums["stage1_bits"]
    student = sums[f"{bits.value}_bits"]
    found = {
        "teacher_bits_per_byte": _over(teacher, size),
        "student_bits_per_byte": _over(student, size),
        "retention": _over(teacher, student),
        "gap_bits_per_byte": _over(student - teacher, size),
        "gold_bits_per_byte": _over(sums["gold_bits"], size),
        "router_bits_per_byte": _over(sums["router_bits"], size),
        "stage1_bits_per_byte": _over(stage1, size),
        "stage1_retention": _over(teacher, stage1),
        "next_byte_accuracy": _over(sums["byte_hits"], size),
        # a router that never fires has found nothing
        "boundary_precision": _over(sums["hits"], sums["predicted"], nothing=0.0),
        "boundary_recall": _over(sums["hits"], sums["marked"], nothing=0.0),
        "boundary_f1": _over(2 * sums["hits"], sums["predicted"] + sums["marked"], nothing=0.0),
        "bytes_per_chunk": _over(size, sums["chunks"]),
        "router_bytes_per_chunk": _over(size, sums["router_chunks"], nothing=0.0),
        "alignment_mse_relative": _over(sums["squared_error"], sums["aligned"]) / variance,
        "teacher_bits_per_document_end": _over(sums["teacher_end_bits"], sums["ends"]),
        "student_bits_per_document_end": _over(sums["gold_end_bits"], sums["ends"]),
        "constant_embedding_bits_per_byte": _over(sums["constant_bits"], size),
    }
    if "unigram_bits" in sums:
        found["unigram_bits_per_byte"] = _over(sums["unigram_bits"], size)
    if "merged_bits" in sums:
        found["merged_bits_per_byte"] = _over(sums["merged_bits"], size)
    if "official_bits" in sums:
        found["official_bits_per_byte"] = _over(sums["official_bits"], size)
        found["official_retention"] = _over(teacher, sums["official_bits"])
    if "teacher_exact_bits" in sums:
        found["teacher_exact_bits_per_byte"] = _over(sums["teacher_exact_bits"], size)
    if "teacher_byte_hits" in sums:
        found["teacher_next_byte_accuracy"] = _over(sums["teacher_byte_hits"], size)
    return found


def _over(numerator: NDArray[np.float64], denominator: NDArray[np.float64], nothing: float = np.nan) -> NDArray[Any]:
    """The ratio, ``nothing`` where there is nothing to divide by."""
    return np.divide(numerator, denominator, out=np.full_like(numerator, nothing), where=denominator != 0)
