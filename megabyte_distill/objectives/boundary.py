"""Stage 1c's loss and the boundary measures: the router's p against the tokenizer's bits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megabyte_distill.alphabet import BOS_BYTE
from megabyte_distill.data.chunk_merging import bytes_and_chunks
from megabyte_distill.data.packing import PackedRow
from megabyte_distill.data.text_mask import not_last
from megabyte_distill.objectives.objective import Sums

BYTES_PER_CHUNK = "bytes per chunk"
ROUTER_BYTES_PER_CHUNK = "router bytes per chunk"


def boundary_bce(p: Tensor, bits: Tensor) -> Tensor:
    """Binary cross-entropy [P] in nats, fp32, of p [P] against bits [P]; NaN where p is."""
    # p reaches 0 and 1 exactly where two states are parallel; the clamp keeps the gradient finite there
    p = p.float().clamp(1e-6, 1 - 1e-6)
    # torch raises where p is NaN, on CUDA beyond recovery, and an update with NaN is to be counted and explained
    nan = p.isnan()
    return torch.where(nan, p, F.binary_cross_entropy(p.masked_fill(nan, 0.5), bits.float(), reduction="none"))


def boundary_positions(row: PackedRow) -> Tensor:
    """[P] bool: bytes on which the router is trained; not a segment's last one (its p is 1 by definition), not PAD.

    A loss mask does not matter here: a prompt is cut into chunks as an answer is.
    """
    return row.is_real & not_last(row.cu_seqlens, row.byte_ids.shape[0])


def judged_positions(row: PackedRow) -> Tensor:
    """[P] bool: bytes whose boundary is a prediction: neither BOS, nor a segment's last, nor PAD."""
    return boundary_positions(row) & (row.byte_ids != BOS_BYTE)


def boundary_counts(predicted: Tensor, row: PackedRow) -> dict[str, Tensor]:
    """Hits, predicted and gold ends over :func:`judged_positions`.

    precision = hits / predicted, recall = hits / gold, F1 = 2 hits / (predicted + gold).
    """
    mask = judged_positions(row)
    guess, gold = predicted & mask, row.bits & mask
    return {"hits": (guess & gold).sum(), "predicted": guess.sum(), "gold": gold.sum()}


def f1_pair(predicted: Tensor, row: PackedRow) -> tuple[Tensor, Tensor]:
    """(2 · hits, predicted + gold): a (sum, count) whose ratio over any number of rows is F1."""
    counts = boundary_counts(predicted, row)
    return 2.0 * counts["hits"].to(torch.float64), counts["predicted"] + counts["gold"]


def chunk_lengths(row: PackedRow, predicted: Tensor | None = None) -> Sums:
    """(bytes, chunks) of a row, and under predicted ends [P].

    Nothing where no end is predicted and no chunk is merged: chunks are the teacher's tokens then.
    """
    if row.token_bits is None and predicted is None:
        return {}
    router = {} if predicted is None else {ROUTER_BYTES_PER_CHUNK: bytes_and_chunks(row, predicted)}
    return {BYTES_PER_CHUNK: bytes_and_chunks(row, row.bits), **router}
