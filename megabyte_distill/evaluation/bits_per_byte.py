"""A student beside its teacher on held-out text: bits per byte, retention, boundaries, anchors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megabyte_distill.data.dataset import ByteTokenDataset, DocumentSource
from megabyte_distill.data.packing import PackedRow
from megabyte_distill.data.sampler import evaluation_rows
from megabyte_distill.data.token_bytes import TokenBytes
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


@dataclass(frozen=True, slots=True, kw_only=True)
class PathFigures:
    """Scores without a tokenizer, and the others on the same text; bits per byte."""

    paths: int
    text_bytes: int
    bits_per_byte: float
    """Summed probability of the surviving paths."""
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
    """The student's encoder and backbone reading gold chunks through the token head."""
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
    """Anchor: tokens by their frequency in the training text; None where that is not given."""
    paths: PathFigures | None

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return asdict(self)


@dataclass
class _Total:
    """Row scores of one scorer, summed and by segment."""

    bits: list[Tensor]
    text_bytes: int = 0
    end_bits: float = 0.0
    ends: int = 0

    def add(self, score: RowScore) -> None:
        self.bits.append(score.bits)
        self.text_bytes += int(score.bytes.sum())
        self.end_bits += score.end_bits
        self.ends += score.ends

    @property
    def bits_per_byte(self) -> float:
        return float(torch.cat(self.bits).sum()) / self.text_bytes

    @property
    def bits_per_end(self) -> float | None:
        return self.end_bits / self.ends if self.ends else None


def held_out_rows(
    sources: Sequence[DocumentSource],
    *,
    row_bytes: int,
    chunk_bucket: int = 64,
    max_bytes: int | None = None,
    max_documents: int | None = None,
) -> list[PackedRow]:
    """Rows through the sources in order, nothing left out but what the limits cut off.

    ``max_bytes`` stops behind the row that reaches it; ``max_documents`` counts per source. ValueError for limits
    below 1 and for text without a byte.
    """
    for name, limit in (("max_bytes", max_bytes), ("max_documents", max_documents)):
        if limit is not None and limit < 1:
            raise ValueError(f"{name} is {limit}; expected at least 1")
    rows: list[PackedRow] = []
    size = 0
    for row in _rows(sources, row_bytes, chunk_bucket, max_documents):
        if max_bytes is not None and size >= max_bytes:
            break
        rows.append(row)
        size += sum(text.shape[0] for text in segment_texts(row))
    if not size:
        raise ValueError(f"{', '.join(source.name for source in sources) or 'no data set'}: no text to evaluate on")
    return rows


def _rows(
    sources: Sequence[DocumentSource], row_bytes: int, chunk_bucket: int, max_documents: int | None
) -> Iterator[PackedRow]:
    for source in sources:
        taken = 0
        for row in evaluation_rows(source, row_bytes=row_bytes, chunk_bucket=chunk_bucket):
            first = source.documents.start
            if max_documents is not None and row.documents[0] - first >= max_documents:
                break
            taken += 1
            yield row


def token_counts(sources: Sequence[ByteTokenDataset]) -> NDArray[np.int64]:
    """[W] how often each token stands in the documents of the data sets."""
    table = sources[0].table
    counts = np.zeros(table.vocab_size, dtype=np.int64)
    for source in sources:
        for document in source.documents:
            tokens = source.tokens(document, 0, source.num_tokens(document))
            counts += np.bincount(tokens, minlength=table.vocab_size)
    return counts


def unigram_nll(counts: NDArray[np.int64], table: TokenBytes) -> Tensor:
    """−log P [W] in nats, fp32, with one added to the count of every token that stands for text; special ids have +inf."""
    text = ~table.special
    probability = np.where(text, counts[: table.vocab_size] + 1.0, 0.0)
    with np.errstate(divide="ignore"):
        return torch.from_numpy(-np.log(probability / probability.sum())).float()
