"""F4: chunk states to bytes in the three modes, the straight-through confidence and the residual (csrc/dechunk.cu)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megabyte_distill.config.model import DechunkMode
from megabyte_distill.kernels.dispatch import FusedOp
from megabyte_distill.kernels.fused.arguments import (
    VECTORS,
    absent,
    dtype_code,
    dtype_refusal,
    form_refusal,
    scratch,
    vector_refusal,
)
from megabyte_distill.kernels.library import library_for, prepared

MODE_CODES = {DechunkMode.HARD: 0, DechunkMode.CAUSAL: 1, DechunkMode.OFFICIAL: 2}
"""How the C ABI names the modes."""


def fused_dechunk_residual(
    h: Tensor,
    p: Tensor,
    confidence: Tensor,
    residual: Tensor,
    *,
    ends: Tensor,
    chunk_of_byte: Tensor,
    starts: Tensor,
    mode: DechunkMode,
    null_group: Tensor | None = None,
) -> Tensor:
    """``ops.dechunk_residual`` in one kernel, states in fp32 until the residual is added."""
    if mode is not DechunkMode.OFFICIAL:
        null_group = None
    # in hard mode p is not looked at, and what a byte reads is h itself
    keep = mode is not DechunkMode.HARD and (p.requires_grad or confidence.requires_grad)
    z, _ = torch.ops.megabyte.dechunk_residual(
        h, p.float(), confidence.float(), residual, null_group, ends, chunk_of_byte, starts, MODE_CODES[mode], keep
    )
    result: Tensor = z
    return result


def refusal(
    h: Tensor,
    p: Tensor,
    confidence: Tensor,
    residual: Tensor,
    null_group: Tensor | None,
    ends: Tensor,
    chunk_of_byte: Tensor,
    starts: Tensor,
) -> str | None:
    """Why the kernel cannot take these, or None."""
    scalars = {p.dtype, confidence.dtype} - {torch.float32, torch.bfloat16}
    if scalars:
        return f"got probabilities in {scalars.pop()}, expected float32"
    rows, (chunks, width) = p.shape[0], h.shape
    return (
        dtype_refusal(h, residual, null_group)
        or vector_refusal(width)
        or form_refusal("confidence", confidence, (rows,))
        or form_refusal("residual", residual, (rows, width))
        or form_refusal("null_group", null_group, (width,))
        or form_refusal("ends", ends, (chunks,), torch.int64)
        or form_refusal("chunk_of_byte", chunk_of_byte, (rows,), torch.int64)
        or form_refusal("starts", starts, (chunks,), torch.bool)
    )


FUSED = FusedOp(run=fused_dechunk_residual, refusal=refusal, limits=f"fp32 or bf16, {VECTORS}")


FORWARD_TILE, WHOLE_TILE = 1024, 2048
"""Columns of a block at most. The backward pass sums over the width, so it takes all of it where it can; hard mode's
forward pass gains by few, large blocks."""


_BLOCKS = 256
"""Of a row: about as many as an H200 runs at once, the best of what was tried at 65,536 rows of 2,048 bf16 numbers."""
_SHORTEST, _LONGEST = 32, 256
"""Bytes."""


def _span(rows: int, mode: int) -> int:
    """Bytes of a block. Each warms its EMA up by the chunks around it; hard mode has none, so there less is better."""
    if mode == MODE_CODES[DechunkMode.HARD]:
        return _SHORTEST
    return max(_SHORTEST, min(_LONGEST, rows // _BLOCKS // _SHORTEST * _SHORTEST))


def _tile(width: int, at_most: int) -> int:
    """Columns of a block: equal parts of the width in full warps of 8 columns a thread."""
    parts = -(-width // at_most)
    return -(-width // parts // 256) * 256


@torch.library.custom_op("megabyte::dechunk_residual", mutates_args=())
def _forward(
    h: Tensor,
    p: Tensor,
    confidence: Tensor,
    residual: Tensor,
    null_group: Tensor | None,
    ends: Tensor,
    chunk_of_byte: Tensor,
    starts: Tensor,
    mode: int,
    keep_states: bool,
) -> tuple[Tensor, Tensor]:
    """(z [P, E], the EMA's states [M, E] for the backward pass or nothing)."""
    chunks, width = h.shape
    z = h.new_empty(residual.shape)
    states = torch.empty_like(h, memory_format=torch.contiguous_format) if keep_states else absent(h)
    library_for(h).call(
        "dechunk_forward",
        prepared(h),
        prepared(p),
        prepared(residual),
        None if null_group is None else prepared(null_group),
        prepared(ends),
        prepared(chunk_of_byte),
        prepared(starts),
        z,
        states if keep_states else None,
        chunks,
        residual.shape[0],
        width,
        _span(residual.shape[0], mode),
        _tile(width, WHOLE_TILE if mode == MODE_CODES[DechunkMode.HARD] else FORWARD_TILE),
        mode,
        dtype_code(h),
    )
    return z, states


@_forward.register_fake
def _(
    h: Tensor,
    p: Tensor,
    confidence: Tensor,
    residual: Tensor,
    null_group: Tensor | None,
    ends: Tensor,
    chunk_of_byte: Tensor,
    starts: Tensor,
    mode: int,
    keep_states: bool,
) -> tuple[Tensor, Tensor]:
    return h.new_empty(residual.shape), h.new_empty(h.shape if keep_states else (0,))


@torch.library.custom_op("megabyte::dechunk_residual_backward", mutates_args=())
def _backward(
    dz: Tensor,
    h: Tensor,
    states: Tensor,
    p: Tensor,
    null_group: Tensor | None,
    ends: Tensor,
    chunk_of_byte: Tensor,
    starts: Tensor,
    mode: int,
    wants: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of h, p, confidence and null_group; all but the first empty where ``wants`` says no."""
    chunks, width = h.shape
    want_p, want_confidence, want_null = wants
    dh, d_p, d_confidence, d_null = _backward_shapes(h, p, wants)
    rows = p.shape[0]
    span, tile = _span(rows, mode), _tile(width, WHOLE_TILE)
    blocks, tiles = max(1, -(-rows // span)), -(-width // tile)
    library_for(h).call(
        "dechunk_backward",
        prepared(dz),
        prepared(h),
        states if states.numel() else None,
        prepared(p),
        None if null_group is None else prepared(null_group),
        prepared(ends),
        prepared(chunk_of_byte),
        prepared(starts),
        dh,
        d_confidence if want_confidence else None,
        d_p if want_p else None,
        d_null if want_null else None,
        scratch(h, blocks, width) if want_null else None,
        scratch(h, 2, tiles, rows) if tiles > 1 and (want_p or want_confidence) else None,
        chunks,
        rows,
        width,
        span,
        tile,
        mode,
        dtype_code(h),
    )
    return dh, d_p, d_confidence, d_null


def _backward_shapes(h: Tensor, p: Tensor, wants: list[bool]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    want_p, want_confidence, want_null = wants
    return (
        h.new_empty(h.shape),
        p.new_empty(p.shape if want_p else (0,)),
        p.new_empty(p.shape if want_confidence else (0,)),
        h.new_empty(h.shape[1:] if want_null else (0,)),
    )


@_backward.register_fake
def _(
    dz: Tensor,
    h: Tensor,
    states: Tensor,
    p: Tensor,
    null_group: Tensor | None,
    ends: Tensor,
    chunk_of_byte: Tensor,
    starts: Tensor,
    mode: int,
    wants: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _backward_shapes(h, p, wants)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    h, p, _, _, null_group, ends, chunk_of_byte, starts, mode, _ = inputs
    ctx.save_for_backward(h, output[1], p, null_group, ends, chunk_of_byte, starts)
    ctx.mode = mode
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dz: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    if dz is None:
        return (None,) * 10
    h, states, p, null_group, ends, chunk_of_byte, starts = ctx.saved_tensors
    needs = ctx.needs_input_grad
    wants = [
        needs[1] and ctx.mode != MODE_CODES[DechunkMode.HARD],
        needs[2],
        needs[4] and null_group is not None,
    ]
    grads: list[Tensor | None] = [None] * 4
    if needs[0] or any(wants):
        found = torch.ops.megabyte.dechunk_residual_backward(
            dz, h, states, p, null_group, ends, chunk_of_byte, starts, ctx.mode, wants
        )
        grads = [grad if want else None for grad, want in zip(found, (needs[0], *wants), strict=True)]
    dh, d_p, d_confidence, d_null = grads
    return dh, d_p, d_confidence, dz if needs[3] else None, d_null, None, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_keep)
