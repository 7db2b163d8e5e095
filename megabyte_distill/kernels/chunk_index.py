"""Boundary bits of a packed row, and from them where its chunks begin and end: plain torch, no gradients."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class ChunkIndex(NamedTuple):
    """The M chunks of a packed row; M is a multiple of the bucket; from ``num_chunks`` on they are padding."""

    ends: Tensor
    """[M] int64, the byte that ends chunk j; P − 1 for padding."""
    begins: Tensor
    """[M] int64, its first byte: behind the segment's end before it, or the segment's first; P for padding."""
    chunk_of_byte: Tensor
    """[P] int64, the last chunk of the byte's segment that ended at or before it; −1 before the segment's first end."""
    cu_chunks: Tensor
    """[S'+1] int32, first chunk of each segment, then M; padding is one last dummy segment."""
    starts: Tensor
    """[M] bool, first chunk of a segment (of the dummy one as well)."""
    num_chunks: int
    """Real chunks."""


def threshold_bits(
    p: Tensor, byte_ids: Tensor, is_text: Tensor | None, threshold: float, start_byte: int | None
) -> Tensor:
    """bits [P] bool; see ``ops.boundary_bits``."""
    bits = p > threshold
    if start_byte is not None:
        bits = bits | (byte_ids == start_byte)
    if is_text is None:
        return bits
    return torch.where(is_text, bits, F.pad(is_text[:-1], (1, 0), value=True))


def index_chunks(bits: Tensor, cu_seqlens: Tensor, bucket: int) -> ChunkIndex:
    """The chunks of bits [P] bool; see ``ops.chunk_index``."""
    size = bits.shape[0]
    ends = bits.nonzero()[:, 0]
    num_chunks = ends.shape[0]
    padding = -num_chunks % bucket
    ended = F.pad(bits.to(torch.int64).cumsum(0), (1, 0))
    offsets = cu_seqlens.to(torch.int64)
    cu_chunks = ended[offsets]
    segment = torch.searchsorted(offsets[1:].contiguous(), torch.arange(size, device=bits.device), right=True)
    chunk_of_byte = ended[1:] - 1
    chunk_of_byte = chunk_of_byte.masked_fill(chunk_of_byte < cu_chunks[segment], -1)
    segment_of_chunk = segment[ends]
    starts = torch.ones_like(ends, dtype=torch.bool)
    starts[1:] = segment_of_chunk[1:] != segment_of_chunk[:-1]
    begins = torch.where(starts, offsets[segment_of_chunk], F.pad(ends[:-1] + 1, (1, 0)) if num_chunks else ends)
    if padding:
        ends = F.pad(ends, (0, padding), value=size - 1)
        begins = F.pad(begins, (0, padding), value=size)
        cu_chunks = F.pad(cu_chunks, (0, 1), value=num_chunks + padding)
        starts = F.pad(starts, (0, padding))
        starts[num_chunks] = True
    return ChunkIndex(ends, begins, chunk_of_byte, cu_chunks.to(torch.int32), starts, num_chunks)
