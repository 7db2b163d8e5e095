"""F1: byte table [+ added state] [+ RMSNorm] in one launch, with every gradient (csrc/byte_embedding.cu)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megabyte_distill.kernels.dispatch import FusedOp
from megabyte_distill.kernels.fused.arguments import (
    WIDTHS,
    absent,
    dtype_code,
    dtype_refusal,
    scratch,
    width_refusal,
)
from megabyte_distill.kernels.library import library_for, prepared

_LONG, _MEDIUM = 65_536, 16_384


def fused_byte_embedding(
    byte_ids: Tensor,
    table: Tensor,
    added: Tensor | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """``ops.byte_embedding`` in one kernel. An id outside the table gives a row of NaN."""
    stream, normed, _ = torch.ops.megabyte.byte_embedding(byte_ids, table, added, norm_weight, eps, norm_weight is None)
    result: Tensor = stream if norm_weight is None else normed
    return result


def refusal(
    byte_ids: Tensor, table: Tensor, added: Tensor | None = None, norm_weight: Tensor | None = None
) -> str | None:
    """Why the kernel cannot take these, or None."""
    return dtype_refusal(table, added, norm_weight) or width_refusal(table.shape[1])


FUSED = FusedOp(run=fused_byte_embedding, refusal=refusal, limits=f"fp32 or bf16, {WIDTHS}")


def _rows_per_piece(rows: int) -> int:
    """Rows of the sorted order that one block of the backward pass sums: enough blocks first, then few partial sums."""
    return 64 if rows >= _LONG else 32 if rows >= _MEDIUM else 16


@torch.library.custom_op("megabyte::byte_embedding", mutates_args=())
def _forward(
    byte_ids: Tensor,
    table: Tensor,
    added: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    want_stream: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(residual stream [P, D] fp32, normed rows [P, D], their 1 / rms [P] fp32); what was not asked for is empty."""
    rows, width = byte_ids.shape[0], table.shape[1]
    stream = scratch(table, rows, width) if want_stream else scratch(table, 0)
    normed = absent(table) if norm_weight is None else table.new_empty(rows, width)
    scale = scratch(table, 0 if norm_weight is None else rows)
    library_for(table).call(
        "byte_embedding_forward",
        prepared(byte_ids),
        prepared(table),
        None if added is None else prepared(added),
        None if norm_weight is None else prepared(norm_weight),
        stream if want_stream else None,
        normed,
        scale,
        rows,
        width,
        table.shape[0],
        eps,
        dtype_code(table),
    )
    return stream, normed, scale


@_forward.register_fake
def _(
    byte_ids: Tensor, table: Tensor, added: Tensor | None, norm_weight: Tensor | None, eps: float, want_stream: bool
) -> tuple[Tensor, Tensor, Tensor]:
    rows, width = byte_ids.shape[0], table.shape[1]
    stream = table.new_empty((rows, width) if want_stream else (0,), dtype=torch.float32)
    normed = table.new_empty((0,) if norm_weight is None else (rows, width))
    return stream, normed, table.new_empty((0 if norm_weight is None else rows,), dtype=torch.float32)


@torch.library.custom_op("megabyte::byte_embedding_backward", mutates_args=())
def _backward(
    d_stream: Tensor | None,
    d_normed: Tensor | None,
    byte_ids: Tensor,
    table: Tensor,
    added: Tensor | None,
    norm_weight: Tensor | None,
    scale: Tensor,
    wants: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of table, added and norm_weight; empty where ``wants`` says no. The norm's two come together."""
    rows, (vocabulary, width) = byte_ids.shape[0], table.shape
    want_table, want_added, want_weight = wants
    d_table, d_added, d_weight = _backward_shapes(table, rows, wants)
    piece = _rows_per_piece(rows)
    pieces = -(-rows // piece)
    order, run_starts = _sorted(byte_ids, vocabulary) if want_table else (None, None)
    library_for(table).call(
        "byte_embedding_backward",
        None if d_stream is None else prepared(d_stream),
        None if d_normed is None else prepared(d_normed),
        prepared(byte_ids),
        order,
        run_starts,
        prepared(table),
        None if added is None else prepared(added),
        None if norm_weight is None else prepared(norm_weight),
        scale,
        d_table if want_table else None,
        d_added if want_added else None,
        d_weight if want_weight else None,
        scratch(table, pieces, 2, width) if want_table else None,
        scratch(table, pieces, width) if want_weight else None,
        rows,
        width,
        vocabulary,
        piece,
        dtype_code(table),
    )
    return d_table, d_added, d_weight


def _backward_shapes(table: Tensor, rows: int, wants: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    want_table, want_added, want_weight = wants
    vocabulary, width = table.shape
    return (
        table.new_empty((vocabulary, width) if want_table else (0,)),
        table.new_empty((rows, width) if want_added else (0,)),
        table.new_empty((width,) if want_weight else (0,)),
    )


@_backward.register_fake
def _(
    d_stream: Tensor | None,
    d_normed: Tensor | None,
    byte_ids: Tensor,
    table: Tensor,
    added: Tensor | None,
    norm_weight: Tensor | None,
    scale: Tensor,
    wants: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    return _backward_shapes(table, byte_ids.shape[0], wants)


def _sorted(byte_ids: Tensor, vocabulary: int) -> tuple[Tensor, Tensor]:
    """(the places of the bytes in order of their ids [P], the first place of each id [vocabulary + 1])."""
    keys = byte_ids.to(torch.uint8) if vocabulary <= 256 else byte_ids  # one pass of a radix sort instead of eight
    values, order = keys.sort(stable=True)
    edges = torch.arange(vocabulary + 1, device=byte_ids.device)
    return order, torch.searchsorted(values.to(torch.int64), edges)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    byte_ids, table, added, norm_weight, _, _ = inputs
    ctx.save_for_backward(byte_ids, table, added, norm_weight, output[2])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, d_stream: Tensor | None, d_normed: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    byte_ids, table, added, norm_weight, scale = ctx.saved_tensors
    if norm_weight is None or d_normed is None:
        norm_weight = d_normed = None
    wanted = ctx.needs_input_grad[1:4]
    wants = [wanted[0], wanted[1] and added is not None, wanted[2] and norm_weight is not None]
    if (d_stream is None and d_normed is None) or not any(wants):
        return (None,) * 6
    grads = torch.ops.megabyte.byte_embedding_backward(
        d_stream, d_normed, byte_ids, table, added, norm_weight, scale, wants
    )
    return (None, *(grad if want else None for grad, want in zip(grads, wants, strict=True)), None, None)


_forward.register_autograd(_differentiate, setup_context=_keep)
