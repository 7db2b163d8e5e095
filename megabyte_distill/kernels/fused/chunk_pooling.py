"""F3: one state a chunk from the states of its bytes, and back, in one launch each (csrc/chunk_pooling.cu)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megabyte_distill.config.model import ChunkPooling
from megabyte_distill.kernels.dispatch import FusedOp
from megabyte_distill.kernels.fused.arguments import VECTORS, dtype_code, dtype_refusal, form_refusal, vector_refusal
from megabyte_distill.kernels.library import library_for, prepared

_MODES = {ChunkPooling.LAST: 0, ChunkPooling.MEAN_LAST: 1, ChunkPooling.MAX: 2}
_MAX = _MODES[ChunkPooling.MAX]


def fused_chunk_pool(
    r: Tensor, begins: Tensor, ends: Tensor, num_chunks: int, pooling: ChunkPooling = ChunkPooling.LAST
) -> Tensor:
    """``ops.chunk_pool``: r is read once, its gradient written once. One thread walks a chunk's bytes."""
    pooled: Tensor = torch.ops.megabyte.chunk_pool(r, begins, ends, num_chunks, _MODES[pooling])[0]
    return pooled


def refusal(r: Tensor, begins: Tensor, ends: Tensor) -> str | None:
    """Why the kernel cannot take these, or None."""
    chunks = ends.shape[0]
    return (
        dtype_refusal(r)
        or vector_refusal(r.shape[1])
        or form_refusal("begins", begins, (chunks,), torch.int64)
        or form_refusal("ends", ends, (chunks,), torch.int64)
    )


FUSED = FusedOp(run=fused_chunk_pool, refusal=refusal, limits=f"fp32 or bf16, {VECTORS}")


@torch.library.custom_op("megabyte::chunk_pool", mutates_args=())
def _forward(r: Tensor, begins: Tensor, ends: Tensor, num_chunks: int, mode: int) -> tuple[Tensor, Tensor]:
    """(pooled [M, E], byte of the maximum [M, E] int32, empty in other modes)."""
    pooled, argmax = _outputs(r, ends, mode)
    library_for(r).call(
        "chunk_pool_forward",
        prepared(r),
        prepared(begins),
        prepared(ends),
        pooled,
        argmax if mode == _MAX else None,
        num_chunks,
        ends.shape[0],
        r.shape[1],
        mode,
        dtype_code(r),
    )
    return pooled, argmax


@_forward.register_fake
def _(r: Tensor, begins: Tensor, ends: Tensor, num_chunks: int, mode: int) -> tuple[Tensor, Tensor]:
    return _outputs(r, ends, mode)


def _outputs(r: Tensor, ends: Tensor, mode: int) -> tuple[Tensor, Tensor]:
    shape = (ends.shape[0], r.shape[1])
    return r.new_empty(shape), r.new_empty(shape if mode == _MAX else (0,), dtype=torch.int32)


@torch.library.custom_op("megabyte::chunk_pool_backward", mutates_args=())
def _backward(
    grad: Tensor, begins: Tensor, ends: Tensor, argmax: Tensor, num_chunks: int, rows: int, mode: int
) -> Tensor:
    """Gradient of r [rows, E]."""
    d_r = grad.new_empty(rows, grad.shape[1])
    library_for(grad).call(
        "chunk_pool_backward",
        prepared(grad),
        prepared(begins),
        prepared(ends),
        argmax if mode == _MAX else None,
        d_r,
        num_chunks,
        rows,
        grad.shape[1],
        mode,
        dtype_code(grad),
    )
    return d_r


@_backward.register_fake
def _(grad: Tensor, begins: Tensor, ends: Tensor, argmax: Tensor, num_chunks: int, rows: int, mode: int) -> Tensor:
    return grad.new_empty(rows, grad.shape[1])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    r, begins, ends, ctx.num_chunks, ctx.mode = inputs
    ctx.rows = r.shape[0]
    ctx.save_for_backward(begins, ends, output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, None, None, None, None]:
    if grad is None:
        return None, None, None, None, None
    d_r = torch.ops.megabyte.chunk_pool_backward(grad, *ctx.saved_tensors, ctx.num_chunks, ctx.rows, ctx.mode)
    return d_r, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_keep)
