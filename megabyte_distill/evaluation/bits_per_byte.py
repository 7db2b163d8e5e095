"""A student beside its teacher on held-out text: bits per byte, retention, boundaries, anchors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from megabyte_distill.data.packing import PackedRow
from megabyte_distill.evaluation.anchors import score_constant_embedding, score_unigram
from megabyte_distill.evaluation.held_out import openings
from megabyte_distill.inference.bit_paths import device_of
from megabyte_distill.inference.scoring import (
    RowScore,
    joint_nll,
    joint_row_score,
    score_paths,
    score_row,
    score_tokens,
    segment_texts,
    token_nll,
    token_row_score,
)
from megabyte_distill.model.backbone import Backbone
from megabyte_distill.model.router import decide
from megabyte_distill.model.student import Gold, Parts, RouterDecides, Student
from megabyte_distill.objectives.alignment import alignment_squared_error, table_variance
from megabyte_distill.objectives.boundary import boundary_counts

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """All figures of :func:`evaluate_run`. Bits per byte leave out the event "the document ends"."""

    text_bytes: int
    documents: int
    is_bound: bool
    """False in official dechunk, which reads p and so the next byte: the student's figures then credit a leak."""
    teacher_bits_per_byte: float
    """Of the teacher's canonical tokens."""
    student_bits_per_byte: float
    """Joint, gold bits as input and label: the same quantity as the teacher's."""
    retention: float
    """Teacher's over student's."""
    gap_bits_per_byte: float
    """Student's minus teacher's."""
    router_bits_per_byte: float
    """Joint, the router's bits as input and label."""
    stage1_bits_per_byte: float
    """Gold chunks of bytes through encoder, backbone and token head."""
    stage1_retention: float
    boundary_precision: float
    boundary_recall: float
    boundary_f1: float
    bytes_per_chunk: float
    """Of the teacher's tokens."""
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

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return asdict(self)


@dataclass
class _Scorer:
    """Sums of one scorer over rows."""

    segment_bits: list[Tensor] = field(default_factory=list)
    end_bits: float = 0.0

    def add(self, score: RowScore) -> None:
        self.segment_bits.append(score.bits.cpu())
        self.end_bits += score.end_bits

    @property
    def bits(self) -> float:
        return float(torch.cat(self.segment_bits).sum())


@dataclass
class _Sums:
    """Everything that is added up over rows."""

    teacher: _Scorer = field(default_factory=_Scorer)
    gold: _Scorer = field(default_factory=_Scorer)
    router: _Scorer = field(default_factory=_Scorer)
    stage1: _Scorer = field(default_factory=_Scorer)
    constant: _Scorer = field(default_factory=_Scorer)
    unigram: _Scorer = field(default_factory=_Scorer)
    text_bytes: int = 0
    ends: int = 0
    hits: int = 0
    predicted: int = 0
    marked: int = 0
    """Gold ends among the bytes where a boundary is a prediction."""
    chunks: int = 0
    """Gold chunks of text: BOS not counted."""
    router_chunks: int = 0
    squared_error: float = 0.0
    aligned: int = 0


@torch.no_grad()
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
) -> Evaluation:
    """All figures on the given rows (``held_out.held_out_rows``).

    Args:
        student: after 2a or 2b; an earlier one gives bits per byte of an untrained decoder.
        teacher: what it was distilled from.
        rows: at least one byte of text; on the student's device or not.
        aligned_student: the student after 1a, for the alignment error. Default: ``stage1_student``.
        stage1_student: the student after 1b, for the figures of the token head. 2b trains the
            backbone on, and the token head no longer fits exactly. Default: ``student``.
        unigram: ``anchors.unigram_nll`` [W] of the training text, for the anchor.
        paths: K of the figure without a tokenizer, which steps byte by byte; 0 leaves it out, as does official mode,
            which cannot step.
        path_bytes: about how much text that figure is taken over: the openings of evenly spread rows.
    """
    device = device_of(student)
    sums = _Sums()
    for row in (row.to(device) for row in rows):
        _add_row(sums, student, teacher, row)
        stage1 = stage1_student or student
        _add_stage1(sums, stage1, aligned_student or stage1, teacher, row)
        if unigram is not None:
            sums.unigram.add(score_unigram(unigram.to(device), row))
    figures = None
    if paths and not student.is_official:
        figures = path_figures(student, teacher, openings(rows, path_bytes), paths=paths)
    documents = sums.ends + int(not _ends_document(rows[-1]))
    variance = float(table_variance(teacher.embedding_table, teacher.columns))
    has_unigram = unigram is not None
    report = _report(sums, variance=variance, documents=documents, has_unigram=has_unigram, paths=figures)
    return replace(report, is_bound=not student.is_official)


def _add_row(sums: _Sums, student: Student, teacher: Backbone, row: PackedRow) -> None:
    outputs = student(row, Gold(), Parts.ALL)
    score = joint_row_score(joint_nll(outputs.logits, row.bits, row), row)
    sums.gold.add(score)
    sums.text_bytes += int(score.bytes.sum())
    sums.ends += score.ends
    sums.router.add(score_row(student, row, RouterDecides()))
    sums.teacher.add(score_tokens(teacher, row))
    sums.constant.add(score_constant_embedding(teacher, row))
    predicted = decide(outputs.p, row.byte_ids, official=student.is_official)
    counts = boundary_counts(predicted, row)
    sums.hits += int(counts["hits"])
    sums.predicted += int(counts["predicted"])
    sums.marked += int(counts["gold"])
    sums.chunks += int(row.token_mask.sum()) - len(row.documents)
    sums.router_chunks += int((predicted & row.loss_mask).sum()) - len(row.documents)


def _add_stage1(sums: _Sums, student: Student, aligned: Student, teacher: Backbone, row: PackedRow) -> None:
    outputs = student(row, Gold(), Parts.ENCODER | Parts.BACKBONE)
    backbone = student.backbone
    assert isinstance(backbone, Backbone) and outputs.hidden is not None
    sums.stage1.add(token_row_score(token_nll(backbone, outputs.hidden, row.token_labels), row))
    chunks = aligned(row, Gold(), Parts.ENCODER).chunks
    target = teacher.embed(row.tokens[row.token_mask])
    sums.squared_error += float(alignment_squared_error(chunks[row.token_mask], target).double().sum())
    sums.aligned += int(target.shape[0])


def path_figures(
    student: Student, teacher: Backbone, rows: Sequence[PackedRow], *, paths: int = 4, batch: int = 32
) -> PathFigures:
    """The student along K paths, and gold bits and the teacher on the same rows; ``batch`` segments run side by side.

    ValueError for rows without a byte of text and in official mode.
    """
    device = device_of(student)
    gold, tokens = _Scorer(), _Scorer()
    texts: list[Tensor] = []
    for row in (row.to(device) for row in rows):
        gold.add(score_row(student, row))
        tokens.add(score_tokens(teacher, row))
        texts += [text for text in segment_texts(row) if text.shape[0]]
    size = sum(text.shape[0] for text in texts)
    if not size:
        raise ValueError(NO_TEXT)
    score = score_paths(student, texts, paths=paths, batch=batch)
    return PathFigures(
        paths=paths,
        text_bytes=size,
        bits_per_byte=float(score.bits.sum()) / size,
        filter_bits_per_byte=float(score.filter_bits.sum()) / size,
        gold_bits_per_byte=gold.bits / size,
        teacher_bits_per_byte=tokens.bits / size,
    )


def _report(
    sums: _Sums, *, variance: float, documents: int, has_unigram: bool, paths: PathFigures | None
) -> Evaluation:
    size = sums.text_bytes
    if not size:
        raise ValueError(NO_TEXT)
    teacher, student, stage1 = sums.teacher.bits, sums.gold.bits, sums.stage1.bits
    return Evaluation(
        text_bytes=size,
        documents=documents,
        is_bound=True,
        teacher_bits_per_byte=teacher / size,
        student_bits_per_byte=student / size,
        retention=teacher / student,
        gap_bits_per_byte=(student - teacher) / size,
        router_bits_per_byte=sums.router.bits / size,
        stage1_bits_per_byte=stage1 / size,
        stage1_retention=teacher / stage1,
        boundary_precision=_ratio(sums.hits, sums.predicted),
        boundary_recall=_ratio(sums.hits, sums.marked),
        boundary_f1=_ratio(2 * sums.hits, sums.predicted + sums.marked),
        bytes_per_chunk=size / sums.chunks,
        router_bytes_per_chunk=_ratio(size, sums.router_chunks),
        alignment_mse_relative=sums.squared_error / sums.aligned / variance,
        teacher_bits_per_document_end=sums.teacher.end_bits / sums.ends if sums.ends else None,
        student_bits_per_document_end=sums.gold.end_bits / sums.ends if sums.ends else None,
        constant_embedding_bits_per_byte=sums.constant.bits / size,
        unigram_bits_per_byte=sums.unigram.bits / size if has_unigram else None,
        paths=paths,
    )


def _ratio(numerator: int, denominator: int) -> float:
    """0 where nothing was predicted or marked: a router that never fires has found nothing."""
    return numerator / denominator if denominator else 0.0


def _ends_document(row: PackedRow) -> bool:
    """True where the row's last segment ends its document."""
    return bool(row.token_ends_document[int(row.token_mask.sum()) - 1])
