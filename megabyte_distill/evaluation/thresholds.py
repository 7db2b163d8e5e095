"""What a student makes of text under its router's bits at several thresholds: quality against backbone steps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megabyte_distill.data.chunk_merging import bytes_and_chunks, merge_row
from megabyte_distill.data.packing import PackedRow
from megabyte_distill.data.text_mask import text_positions
from megabyte_distill.inference.bit_paths import device_of
from megabyte_distill.inference.scoring import joint_nll
from megabyte_distill.model.router import decide
from megabyte_distill.model.student import Given, Parts, Student
from megabyte_distill.objectives.boundary import f1_pair


@dataclass(frozen=True, slots=True, kw_only=True)
class ThresholdFigures:
    """All text under one choice of boundary bits, as input and label."""

    bits: str
    """Whose: router, gold (the teacher's tokens), or merged (the stage's larger chunks)."""
    threshold: float | None
    """Above which the router's p ends a chunk; None for bits that are not the router's."""
    bits_per_byte: float
    """Joint."""
    bytes_per_chunk: float
    backbone_steps_per_byte: float
    """BOS chunks are steps too."""
    gold_f1: float
    """Of the ends, against those of the teacher's tokens."""
    merged_f1: float | None
    """Against those of the stage's larger chunks; None where it had none."""


@torch.no_grad()
def sweep(
    student: Student, rows: Iterable[PackedRow], thresholds: Sequence[float], limit: float | None
) -> list[ThresholdFigures]:
    """Figures under the teacher's bits, the merged ones and the router's at each threshold.

    ``limit``: what the stage merged tokens with at its end (``chunk_merging.merge_row``), None where it did not.
    """
    names: list[tuple[str, float | None]] = [("gold", None)]
    names += [("merged", None)] if limit is not None else []
    names += [("router", threshold) for threshold in thresholds]
    sums = torch.zeros(len(names), len(_COUNTS), dtype=torch.float64)
    for row in (row.to(device_of(student)) for row in rows):
        p = student(row, parts=Parts.ENCODER | Parts.ROUTER).p
        merged = merge_row(row, limit)
        choices = [row.bits] + ([merged.bits] if limit is not None else [])
        choices += [
            decide(p, row.byte_ids, threshold, official=student.is_official, is_text=row.is_real)
            for threshold in thresholds
        ]
        sums += torch.stack([_counts(student, row, merged, bits).cpu() for bits in choices])
    named = (dict(zip(_COUNTS, of, strict=True)) for of in sums.tolist())
    return [_figures(*name, counts, limit) for name, counts in zip(names, named, strict=True)]


_COUNTS = ("nats", "bytes", "chunks", "steps", "hits", "ends", "merged_hits", "merged_ends")


def _counts(student: Student, row: PackedRow, merged: PackedRow, bits: Tensor) -> Tensor:
    nll = joint_nll(student(row, Given(bits)).logits, bits, row)
    size, chunks = bytes_and_chunks(row, bits)
    values = (
        nll[text_positions(row)].double().sum(),
        size,
        chunks,
        (bits & row.is_real).sum(),
        *f1_pair(bits, row),
        *f1_pair(bits, merged),
    )
    return torch.stack([value.double() for value in values])


def _figures(bits: str, threshold: float | None, counts: dict[str, float], limit: float | None) -> ThresholdFigures:
    def over(numerator: float, denominator: float) -> float:
        return numerator / denominator if denominator else 0.0

    return ThresholdFigures(
        bits=bits,
        threshold=threshold,
        bits_per_byte=over(counts["nats"], counts["bytes"]) / math.log(2),
        bytes_per_chunk=over(counts["bytes"], counts["chunks"]),
        backbone_steps_per_byte=over(counts["steps"], counts["bytes"]),
        gold_f1=over(counts["hits"], counts["ends"]),
        merged_f1=None if limit is None else over(counts["merged_hits"], counts["merged_ends"]),
    )
