"""What is added up over documents: code lengths, boundaries, next bytes. Every figure is a function of these sums."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from enum import StrEnum

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megabyte_distill.alphabet import BYTE_VOCAB, PAD_BYTE
from megabyte_distill.data.chunk_merging import merge_row
from megabyte_distill.data.packing import PackedRow
from megabyte_distill.data.text_mask import document_end_positions, text_positions
from megabyte_distill.evaluation.anchors import score_constant_embedding, score_unigram
from megabyte_distill.inference.bit_paths import device_of
from megabyte_distill.inference.scoring import joint_nll, joint_row_score, score_official, token_nll, token_row_score
from megabyte_distill.inference.teacher_bytes import score_teacher_bytes
from megabyte_distill.model.backbone import Backbone
from megabyte_distill.model.router import decide
from megabyte_distill.model.student import Given, Gold, Parts, RouterDecides, Student
from megabyte_distill.objectives.alignment import alignment_squared_error
from megabyte_distill.objectives.boundary import judged_positions
from megabyte_distill.objectives.byte_tree import ByteTree
from megabyte_distill.objectives.exact_targets import exact_targets

_LN2 = float(np.log(2))


class Bits(StrEnum):
    """Whose boundary bits the student's headline figures are under, as input and label."""

    GOLD = "gold"
    ROUTER = "router"
    MERGED = "merged"
    """The gold ends that the student's stage kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """The models that are compared, all on one device, and what else a figure needs."""

    student: Student
    teacher: Backbone
    distilled: Student
    """The student whose token head is scored: after 1b."""
    aligned: Student
    """The student whose encoder is compared with the embeddings: after 1a."""
    unigram: Tensor | None = None
    """[W] nats of each token by frequency."""
    tree: ByteTree | None = None
    """The teacher's vocabulary, for its next-byte accuracy."""
    bits: Bits
    """Under which next bytes are told."""
    merge_limit: float | None = None
    """What the student's stage merged tokens with: the ends that its boundaries are judged by; None: the tokens'."""
    official: bool = False
    """The paper's score as well."""
    threshold: float = 0.5
    """Above which the router's p ends a chunk."""

    def on_its_device(self) -> Judged:
        """The same, with the tensors where the student is."""
        device = device_of(self.student)
        unigram = None if self.unigram is None else self.unigram.to(device)
        return replace(self, unigram=unigram, tree=None if self.tree is None else self.tree.to(device))


@dataclass
class DocumentCounts:
    """Sums by document of one data set; documents come in the order in which rows show them."""

    place: dict[int, int] = field(default_factory=dict)
    segments: dict[str, list[NDArray[np.float64]]] = field(default_factory=dict)
    owners: list[int] = field(default_factory=list)

    def add(self, row: PackedRow, counts: dict[str, Tensor]) -> None:
        """Counts [S] of the row's real segments."""
        self.owners += [self.place.setdefault(document, len(self.place)) for document in row.documents]
        for name, values in counts.items():
            self.segments.setdefault(name, []).append(values.double().cpu().numpy())

    def table(self) -> dict[str, NDArray[np.float64]]:
        """Name → [D], one entry a document."""
        owners = np.array(self.owners, dtype=np.int64)
        return {
            name: np.bincount(owners, np.concatenate(parts), len(self.place)).astype(np.float64, copy=False)
            for name, parts in self.segments.items()
        }


@torch.no_grad()
def count_rows(judged: Judged, rows: Iterable[PackedRow]) -> dict[str, NDArray[np.float64]]:
    """Name → [D] counts of each document in the rows of one data set."""
    judged = judged.on_its_device()
    device = device_of(judged.student)
    counts = DocumentCounts()
    for row in (row.to(device) for row in rows):
        counts.add(row, {**_of_student(judged, row), **_of_teacher(judged, row), **_of_stage1(judged, row)})
    return counts.table()


def _of_student(judged: Judged, row: PackedRow) -> dict[str, Tensor]:
    student = judged.student
    under_gold = student(row, Gold(), Parts.ALL)
    under_router = student(row, RouterDecides(judged.threshold), Parts.ALL)
    nll = joint_nll(under_gold.logits, row.bits, row)
    router_nll = joint_nll(under_router.logits, under_router.bits, row)
    ends = document_end_positions(row)
    score = joint_row_score(nll, row)
    predicted = decide(under_gold.p, row.byte_ids, judged.threshold, official=student.is_official)
    mask = judged_positions(row)
    told = {Bits.GOLD: under_gold.logits, Bits.ROUTER: under_router.logits}
    marked, merged = row.bits, {}
    if judged.merge_limit is not None:
        marked = merge_row(row, judged.merge_limit).bits
        told[Bits.MERGED] = student(row, Given(marked), Parts.ALL).logits
        merged = {"merged_bits": joint_row_score(joint_nll(told[Bits.MERGED], marked, row), row).bits}
    bytes_told = told[judged.bits]
    official = {"official_bits": score_official(student, row, judged.threshold).bits} if judged.official else {}
    return {
        **official,
        **merged,
        "text_bytes": score.bytes,
        "ends": _by_segment(ends, row),
        "gold_bits": score.bits,
        "gold_end_bits": _by_segment(torch.where(ends, nll.double(), 0.0), row) / _LN2,
        "router_bits": joint_row_score(router_nll, row).bits,
        "hits": _by_segment(predicted & marked & mask, row),
        "predicted": _by_segment(predicted & mask, row),
        "marked": _by_segment(marked & mask, row),
        # BOS, a chunk of its own, is no text
        "chunks": _by_segment(marked & row.is_real, row) - 1,
        "router_chunks": _by_segment(predicted & row.is_real, row) - 1,
        "byte_hits": _byte_hits(torch.logaddexp(bytes_told[:, :BYTE_VOCAB], bytes_told[:, BYTE_VOCAB:]), row),
    }


def _of_teacher(judged: Judged, row: PackedRow) -> dict[str, Tensor]:
    teacher = judged.teacher
    hidden = teacher(teacher.embed(row.tokens), row.cu_chunks)
    nll = token_nll(teacher, hidden, row.token_labels)
    ends = row.token_mask & row.token_ends_document
    found = {
        "teacher_bits": token_row_score(nll, row).bits,
        "teacher_end_bits": _by_segment(torch.where(ends, nll.double(), 0.0), row, chunks=True) / _LN2,
        "constant_bits": score_constant_embedding(teacher, row).bits,
    }
    if judged.unigram is not None:
        found["unigram_bits"] = score_unigram(judged.unigram, row).bits
    if judged.tree is not None:
        found["teacher_exact_bits"] = score_teacher_bytes(teacher, judged.tree, row).bits
        # where it has no opinion the label given here stands: PAD, which is never right
        nothing = torch.full_like(row.labels, PAD_BYTE)
        targets = exact_targets(
            judged.tree, hidden, head=teacher.own_logits, byte_ids=row.byte_ids, bits=row.bits, labels=nothing,
            wanted=text_positions(row),
        ).distribution  # fmt: skip
        found["teacher_byte_hits"] = _byte_hits(targets[:, :BYTE_VOCAB] + targets[:, BYTE_VOCAB:], row)
    return found


def _of_stage1(judged: Judged, row: PackedRow) -> dict[str, Tensor]:
    outputs = judged.distilled(row, Gold(), Parts.ENCODER | Parts.BACKBONE)
    backbone = judged.distilled.backbone
    assert isinstance(backbone, Backbone) and outputs.hidden is not None
    nll = token_nll(backbone, outputs.hidden, row.token_labels)
    chunks = judged.aligned(row, Gold(), Parts.ENCODER).chunks
    error = alignment_squared_error(chunks, judged.teacher.embed(row.tokens))
    return {
        "stage1_bits": token_row_score(nll, row).bits,
        "squared_error": _by_segment(torch.where(row.token_mask, error.double(), 0.0), row, chunks=True),
        "aligned": _by_segment(row.token_mask, row, chunks=True),
    }


def _byte_hits(scores: Tensor, row: PackedRow) -> Tensor:
    """[S] bytes of text that have the highest of their scores [P, 256]."""
    return _by_segment((scores.argmax(-1) == row.labels % BYTE_VOCAB) & text_positions(row), row)


def _by_segment(values: Tensor, row: PackedRow, *, chunks: bool = False) -> Tensor:
    """[S] fp64 sums over real segments of values [P], or with ``chunks`` [M]."""
    edges = (row.cu_chunks if chunks else row.cu_seqlens).to(torch.int64)
    total = torch.nn.functional.pad(values.double().cumsum(0), (1, 0))
    return (total[edges[1:]] - total[edges[:-1]])[: len(row.documents)]
