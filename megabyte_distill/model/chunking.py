"""From boundary bits to a packed layout of chunks, and the chunks' states; ``pool_step`` is the same byte by byte."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megabyte_distill.config.model import ChunkPooling
from megabyte_distill.kernels.ops import ChunkIndex, accumulation_dtype, chunk_index, chunk_pool
from megabyte_distill.model.row_state import RowState, after_each

ChunkLayout = ChunkIndex
"""The M chunks of a packed row. −1 in chunk_of_byte is reached only when BOS is not an end: the official way."""


def chunk_layout(bits: Tensor, cu_seqlens: Tensor, bucket: int) -> ChunkLayout:
    """The layout of bits [P] bool over segments cu_seqlens [S+1] int32, padded to a multiple of ``bucket`` chunks.

    Raises:
        ValueError: for a bucket below 1.
    """
    if bucket < 1:
        raise ValueError(f"chunk bucket is {bucket}; it counts chunks and must be at least 1")
    return chunk_index(bits, cu_seqlens, bucket)


def pool_chunks(r: Tensor, layout: ChunkLayout, pooling: ChunkPooling = ChunkPooling.LAST) -> Tensor:
    """The state of each chunk from those of its bytes, r [P, E] -> [M, E]; zero rows where the layout is padding."""
    return chunk_pool(r, layout.begins, layout.ends, layout.num_chunks, pooling)


@dataclass(frozen=True, slots=True)
class PoolState(RowState):
    """What a row remembers of the chunk that its last byte did not end."""

    value: Tensor
    """[R, E] fp32, the sum or the maximum of the chunk's states so far; [R, 0] where only the last one counts."""
    count: Tensor
    """[R] int64, the chunk's bytes so far."""


def init_pool_state(
    rows: int, width: int, pooling: ChunkPooling, device: torch.device, dtype: torch.dtype
) -> PoolState:
    """The state of ``rows`` sequences in front of their BOS; dtype is that of the encoder's states."""
    kept = 0 if pooling is ChunkPooling.LAST else width
    value = torch.zeros(rows, kept, device=device, dtype=accumulation_dtype(dtype))
    return PoolState(value, torch.zeros(rows, device=device, dtype=torch.int64))


def pool_step(state: PoolState, r: Tensor, ended: Tensor, pooling: ChunkPooling) -> tuple[Tensor, PoolState]:
    """One byte of each row: r [R, E], ended [R] bool -> (the chunk's state if it ends here [R, E], the next state)."""
    if pooling is ChunkPooling.LAST:
        return r, state
    wide, begins = r.to(state.value.dtype), (state.count == 0)[:, None]
    count = state.count + 1
    if pooling is ChunkPooling.MEAN_LAST:
        value = state.value + wide
        pooled = (value / count[:, None] + wide) / 2
    else:
        pooled = value = torch.where(begins, wide, torch.maximum(state.value, wide))
    following = PoolState(value.masked_fill(ended[:, None], 0.0), count.masked_fill(ended, 0))
    return pooled.to(r.dtype), following


def pool_steps(
    state: PoolState, r: Tensor, ended: Tensor, pooling: ChunkPooling
) -> tuple[Tensor, Callable[[Tensor], PoolState]]:
    """:func:`pool_step` over T bytes: r [R, T, E], ended [R, T] -> ([R, T, E], the state behind counts [R] bytes)."""
    if pooling is ChunkPooling.LAST:
        return r, lambda counts: state
    pooled, states = [], [state]
    for t in range(r.shape[1]):
        own, state = pool_step(state, r[:, t], ended[:, t], pooling)
        pooled.append(own)
        states.append(state)
    return torch.stack(pooled, dim=1), lambda counts: after_each(states, counts)
