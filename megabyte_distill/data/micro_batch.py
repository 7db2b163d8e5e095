"""Several packed rows as one: a micro-batch is a longer packed row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from megabyte_distill.data.packing import PackedRow
from megabyte_distill.data.stored_targets import StoredTargets


def _offsets(parts: Sequence[Tensor]) -> Tensor:
    """Cumulative lengths [Σ S + 1] of segments that stand one row after another."""
    lengths = torch.cat([part[1:] - part[:-1] for part in parts])
    return F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


def concatenate_rows(rows: Sequence[PackedRow]) -> PackedRow:
    """The rows one after the other, their bucket padding of chunks replaced by one at the end.

    Losses over the result are the sums of the rows' losses. ValueError for no rows or for differing buckets.
    """
    if not rows or len({row.chunk_bucket for row in rows}) != 1:
        raise ValueError(f"expected rows of one chunk bucket, got {[row.chunk_bucket for row in rows]}")
    if len(rows) == 1:
        return rows[0]
    counts = [int(row.token_ends.sum()) for row in rows]
    stored = [row.stored for row in rows if row.stored is not None]
    is_marked = [row.marked is not None for row in rows]
    assert all(is_marked) or not any(is_marked), "some rows have a loss mask, others none"
    padding = -sum(counts) % rows[0].chunk_bucket

    def join_chunks(name: str) -> Tensor:
        return F.pad(
            torch.cat([getattr(row, name)[:count] for row, count in zip(rows, counts, strict=True)]), (0, padding)
        )

    def join_bytes(name: str) -> Tensor:
        return torch.cat([getattr(row, name) for row in rows])

    is_merged = any(row.token_bits is not None for row in rows)
    forced = [torch.zeros_like(row.bits) if row.forced_ends is None else row.forced_ends for row in rows]
    chunk_offsets = [row.cu_chunks[row.cu_chunks <= count] for row, count in zip(rows, counts, strict=True)]
    cu_chunks = _offsets(chunk_offsets)
    if padding:
        cu_chunks = F.pad(cu_chunks, (0, 1), value=sum(counts) + padding)
    return PackedRow(
        byte_ids=join_bytes("byte_ids"),
        bits=join_bytes("bits"),
        labels=join_bytes("labels"),
        is_real=join_bytes("is_real"),
        tokens=join_chunks("tokens"),
        token_labels=join_chunks("token_labels"),
        token_mask=join_chunks("token_mask"),
        token_ends_document=join_chunks("token_ends_document"),
        cu_seqlens=_offsets([row.cu_seqlens for row in rows]),
        cu_chunks=cu_chunks,
        chunk_bucket=rows[0].chunk_bucket,
        documents=tuple(document for row in rows for document in row.documents),
        stored=StoredTargets.joined(stored) if len(stored) == len(rows) else None,
        token_bits=join_bytes("token_ends") if is_merged else None,
        forced_ends=torch.cat(forced) if is_merged else None,
        marked=join_bytes("marked") if all(is_marked) else None,
    )
