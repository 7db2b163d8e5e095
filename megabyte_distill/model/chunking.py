"""From boundary bits to a packed layout of chunks, and the chunks' states."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megabyte_distill.kernels.ops import chunk_pool


@dataclass(frozen=True, slots=True)
class ChunkLayout:
    """The M chunks of a packed row; M is a multiple of the bucket; from ``num_chunks`` on they are padding."""

    ends: Tensor
    """[M] int64, the byte that ends chunk j; P − 1 for padding."""
    chunk_of_byte: Tensor
    """[P] int64, the last chunk of the byte's segment that ended at or before it; −1 before the segment's first end
    (reached only when BOS is not an end: the official way)."""
    cu_chunks: Tensor
    """[S'+1] int32, first chunk of each segment, then M; padding is one last dummy segment."""
    num_chunks: int
    """Real chunks."""
    starts: Tensor
    """[M] bool, first chunk of a segment (of the dummy one as well)."""


def chunk_layout(bits: Tensor, cu_seqlens: Tensor, bucket: int) -> ChunkLayout:
    """The layout of bits [P] bool over segments cu_seqlens [S+1] int32, padded to a multiple of ``bucket`` chunks.

    Raises:
        ValueError: for a bucket below 1.
    """
    if bucket < 1:
        raise ValueError(f"chunk bucket is {bucket}; it counts chunks and must be at least 1")
    ends = bits.nonzero()[:, 0]
    num_chunks = ends.shape[0]
    padding = -num_chunks % bucket
    ended = torch.nn.functional.pad(bits.to(torch.int64).cumsum(0), (1, 0))
    offsets = cu_seqlens.to(torch.int64)
    cu_chunks = ended[offsets]
    index_P = torch.arange(bits.shape[0], device=bits.device)
    segment = torch.searchsorted(offsets[1:].contiguous(), index_P, right=True)
    chunk_of_byte = ended[1:] - 1
    chunk_of_byte = chunk_of_byte.masked_fill(chunk_of_byte < cu_chunks[segment], -1)
    segment_of_chunk = segment[ends]
    starts = torch.ones_like(ends, dtype=torch.bool)
    starts[1:] = segment_of_chunk[1:] != segment_of_chunk[:-1]
    if padding:
        ends = torch.nn.functional.pad(ends, (0, padding), value=bits.shape[0] - 1)
        cu_chunks = torch.nn.functional.pad(cu_chunks, (0, 1), value=num_chunks + padding)
        starts = torch.nn.functional.pad(starts, (0, padding))
        starts[num_chunks] = True
    return ChunkLayout(ends, chunk_of_byte, cu_chunks.to(torch.int32), num_chunks, starts)


def pool_chunks(r: Tensor, layout: ChunkLayout) -> Tensor:
    """The state of each chunk's last byte, r [P, E] -> [M, E]; zero rows where the layout is padding."""
    return chunk_pool(r, layout.ends, layout.num_chunks)
