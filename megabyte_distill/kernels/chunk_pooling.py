"""One state a chunk from the states of its bytes, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from megabyte_distill.config.model import ChunkPooling


def pool_rows(r: Tensor, begins: Tensor, ends: Tensor, num_chunks: int, pooling: ChunkPooling) -> Tensor:
    """[M, E] of r [P, E]; see ``ops.chunk_pool``."""
    begins, padding, ends = begins[:num_chunks], ends.shape[0] - num_chunks, ends[:num_chunks]
    if num_chunks == 0:
        pooled = r[:0]
    elif pooling is ChunkPooling.LAST:
        pooled = r.index_select(0, ends)
    elif pooling is ChunkPooling.MEAN_LAST:
        pooled = _mean_and_last(r, begins, ends)
    else:
        pooled = r.gather(0, _first_argmax(r.detach(), begins, ends))
    return F.pad(pooled, (0, 0, 0, padding)) if padding else pooled


def _mean_and_last(r: Tensor, begins: Tensor, ends: Tensor) -> Tensor:
    place, _ = _bytes_of_chunks(begins, ends)
    wide = r.to(torch.promote_types(r.dtype, torch.float32))
    means = torch.segment_reduce(wide.index_select(0, place), "mean", lengths=ends - begins + 1, axis=0, unsafe=True)
    return ((means + wide.index_select(0, ends)) / 2).to(r.dtype)


def _first_argmax(r: Tensor, begins: Tensor, ends: Tensor) -> Tensor:
    """[M, E] int64: the first byte of the chunk where a channel is largest; a NaN is larger than all."""
    place, chunk = _bytes_of_chunks(begins, ends)
    values, shape = r.index_select(0, place), (begins.shape[0], r.shape[1])
    chunk = chunk[:, None].expand_as(values)
    largest = values.new_full(shape, -torch.inf).scatter_reduce(0, chunk, values, "amax").gather(0, chunk)
    is_largest = (values == largest) | (values.isnan() & largest.isnan())
    candidates = torch.where(is_largest, place[:, None], r.shape[0])
    return candidates.new_full(shape, r.shape[0]).scatter_reduce(0, chunk, candidates, "amin")


def _bytes_of_chunks(begins: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """(every byte that belongs to a chunk, in order; its chunk): bytes behind a segment's last end are in none."""
    lengths = ends - begins + 1
    chunk = torch.repeat_interleave(torch.arange(begins.shape[0], device=begins.device), lengths)
    skipped = begins - (lengths.cumsum(0) - lengths)
    return torch.arange(chunk.shape[0], device=begins.device) + skipped[chunk], chunk
