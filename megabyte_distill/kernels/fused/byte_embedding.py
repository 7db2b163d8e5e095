"""F1: byte table [+ added state] [+ RMSNorm], with every gradient (csrc/byte_embedding.cu)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megabyte_distill.kernels.dispatch import FusedOp
from megabyte_distill.kernels.fused.arguments import (
    VECTORS,
    absent,
    dtype_code,
    dtype_refusal,
    form_refusal,
    scratch,
    vector_refusal,
    width_refusal,
)
from megabyte_distill.kernels.library import Library, library_for, prepared

MAX_IDS = 256
"""Rows of a table, one for each value of a byte: the kernels sort bytes by counting."""
_ORDER_BLOCKS = 64
_PIECES_OF_MULTIPROCESSOR = 5
"""Of the backward pass (csrc's kSumBlocks): up to a width of 1,024 all run at once."""
_MULTIPROCESSORS_OF_CPU = 132
"""An H100's, where the kernels run on a CPU: they do there what they do on a GPU."""
_LANES = 32


def fused_byte_embedding(
    byte_ids: Tensor,
    table: Tensor,
    added: Tensor | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """``ops.byte_embedding``. An id outside the table gives a row of NaN, and no gradient is defined with it."""
    stream, normed, _ = torch.ops.megabyte.byte_embedding(byte_ids, table, added, norm_weight, eps, norm_weight is None)
    result: Tensor = stream if norm_weight is None else normed
    return result


def refusal(
    byte_ids: Tensor, table: Tensor, added: Tensor | None = None, norm_weight: Tensor | None = None
) -> str | None:
    """Why the kernel cannot take these, or None."""
    if table.shape[0] > MAX_IDS:
        return f"got a table of {table.shape[0]} rows, expected at most {MAX_IDS}"
    whole_rows = added is not None and norm_weight is not None
    rows, width = byte_ids.shape[0], table.shape[1]
    return (
        dtype_refusal(table, added, norm_weight)
        or (width_refusal(width) if whole_rows else vector_refusal(width))
        or form_refusal("byte_ids", byte_ids, (rows,), torch.int64)
        or form_refusal("added", added, (rows, width))
        or form_refusal("norm_weight", norm_weight, (width,))
    )


FUSED = FusedOp(run=fused_byte_embedding, refusal=refusal, limits=f"fp32 or bf16, {VECTORS}, up to {MAX_IDS} ids")


def _rows_per_piece(rows: int, device: torch.device) -> int:
    """Rows of the sorted order that one block of the backward pass sums, a multiple of a warp's lanes."""
    on_gpu = device.type == "cuda"
    processors = torch.cuda.get_device_properties(device).multi_processor_count if on_gpu else _MULTIPROCESSORS_OF_CPU
    return _LANES * max(1, -(-rows // (_PIECES_OF_MULTIPROCESSOR * processors * _LANES)))


@torch.library.custom_op("megabyte::byte_embedding", mutates_args=())
def _forward(
    byte_ids: Tensor,
    table: Tensor,
    added: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    want_stream: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(residual stream [P, D] fp32, normed rows [P, D], 1 / rms fp32 of each byte, or id where nothing is added).

    What was not asked for is empty.
    """
    byte_ids, table = prepared(byte_ids), prepared(table)
    added = None if added is None else prepared(added)
    stream, normed, scale = _forward_shapes(byte_ids, table, added, norm_weight, want_stream)
    call = library_for(table).call
    sizes = (byte_ids.shape[0], table.shape[1], table.shape[0])
    code = dtype_code(table)
    if norm_weight is not None and added is not None:
        weight, kept = prepared(norm_weight), stream if want_stream else None
        call(
            "byte_embedding_added_normed", byte_ids, table, added, weight, kept, normed, scale, *sizes, eps, code
        )  # fmt: skip
    elif norm_weight is not None:
        normed_table = torch.empty_like(table)
        weight = prepared(norm_weight)
        call("byte_embedding_normed", byte_ids, table, weight, normed_table, scale, normed, *sizes, eps, code)
    if want_stream and (norm_weight is None or added is None):
        call("byte_embedding_stream", byte_ids, table, added, stream, *sizes, code)
    return stream, normed, scale


def _forward_shapes(
    byte_ids: Tensor, table: Tensor, added: Tensor | None, norm_weight: Tensor | None, want_stream: bool
) -> tuple[Tensor, Tensor, Tensor]:
    rows, (vocabulary, width) = byte_ids.shape[0], table.shape
    stream = table.new_empty((rows, width) if want_stream else (0,), dtype=torch.float32)
    if norm_weight is None:
        return stream, absent(table), scratch(table, 0)
    return stream, table.new_empty(rows, width), scratch(table, vocabulary if added is None else rows)


@_forward.register_fake
def _(
    byte_ids: Tensor, table: Tensor, added: Tensor | None, norm_weight: Tensor | None, eps: float, want_stream: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _forward_shapes(byte_ids, table, added, norm_weight, want_stream)


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
    """Gradients of table, added and norm_weight; empty where ``wants`` says no. A norm comes with its d_normed."""
    byte_ids, table = prepared(byte_ids), prepared(table)
    d_stream = None if d_stream is None else prepared(d_stream)
    grads = _backward_shapes(table, byte_ids.shape[0], wants)
    if d_normed is None or norm_weight is None:
        assert d_stream is not None
        if wants[0]:
            _stream_backward(d_stream, byte_ids, table, grads, wants)
            return grads
        if wants[1]:
            grads[1].copy_(d_stream)
        return grads
    if added is None:
        _normed_backward(d_stream, prepared(d_normed), byte_ids, table, prepared(norm_weight), scale, grads, wants)
    else:
        rows = d_stream, prepared(d_normed), byte_ids, prepared(added)
        _added_normed_backward(*rows, table, prepared(norm_weight), scale, grads, wants)
    return grads


Grads = tuple[Tensor, Tensor, Tensor]


def _stream_backward(d_stream: Tensor, byte_ids: Tensor, table: Tensor, grads: Grads, wants: list[bool]) -> None:
    library, piece, parts = _plan(byte_ids, table)
    order, run_starts = byte_order(byte_ids, table.shape[0], library)
    library.call(
        "byte_embedding_stream_backward",
        d_stream,
        byte_ids,
        order,
        run_starts,
        grads[0],
        grads[1] if wants[1] else None,
        parts,
        byte_ids.shape[0],
        table.shape[1],
        table.shape[0],
        piece,
        dtype_code(table),
    )


def _normed_backward(
    d_stream: Tensor | None,
    d_normed: Tensor,
    byte_ids: Tensor,
    table: Tensor,
    norm_weight: Tensor,
    scale: Tensor,
    grads: Grads,
    wants: list[bool],
) -> None:
    library, piece, parts = _plan(byte_ids, table)
    order, run_starts = byte_order(byte_ids, table.shape[0], library)
    library.call(
        "byte_embedding_normed_backward",
        d_stream,
        d_normed,
        byte_ids,
        order,
        run_starts,
        table,
        norm_weight,
        scale,
        grads[0] if wants[0] else None,
        grads[2] if wants[2] else None,
        *(scratch(table, *table.shape) for _ in range(3)),
        parts,
        byte_ids.shape[0],
        table.shape[1],
        table.shape[0],
        piece,
        dtype_code(table),
    )


def _added_normed_backward(
    d_stream: Tensor | None,
    d_normed: Tensor,
    byte_ids: Tensor,
    added: Tensor,
    table: Tensor,
    norm_weight: Tensor,
    scale: Tensor,
    grads: Grads,
    wants: list[bool],
) -> None:
    library, piece, parts = _plan(byte_ids, table)
    rows, width = added.shape
    order, run_starts = byte_order(byte_ids, table.shape[0], library) if wants[0] else (None, None)
    library.call(
        "byte_embedding_added_normed_backward",
        d_stream,
        d_normed,
        byte_ids,
        order,
        run_starts,
        table,
        added,
        norm_weight,
        scale,
        *(grad if want else None for grad, want in zip(grads, wants, strict=True)),
        scratch(table, rows, width) if wants[0] else None,
        scratch(table, -(-rows // piece), width),
        parts,
        rows,
        width,
        table.shape[0],
        piece,
        dtype_code(table),
    )


def _plan(byte_ids: Tensor, table: Tensor) -> tuple[Library, int, Tensor]:
    """(library, rows of a piece of the sorted order, room for the partial sums of its pieces)."""
    piece = _rows_per_piece(byte_ids.shape[0], byte_ids.device)
    return library_for(table), piece, scratch(table, -(-byte_ids.shape[0] // piece), 2, table.shape[1])


def byte_order(byte_ids: Tensor, ids_in_table: int, library: Library) -> tuple[Tensor, Tensor]:
    """(places of the bytes in order of their ids [P] int32, stable; the first place of each id [257] int32).

    Bytes outside the table have no place.
    """
    rows = byte_ids.shape[0]
    sizes = (_ORDER_BLOCKS * MAX_IDS, rows, MAX_IDS + 1)
    counts, order, run_starts = (torch.empty(size, device=byte_ids.device, dtype=torch.int32) for size in sizes)
    library.call("byte_order", byte_ids, counts, order, run_starts, rows, ids_in_table)
    return order, run_starts


def _backward_shapes(table: Tensor, rows: int, wants: list[bool]) -> Grads:
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


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    byte_ids, table, added, norm_weight, _, _ = inputs
    ctx.has_added = added is not None
    # only a norm looks at the state again
    ctx.save_for_backward(byte_ids, table, None if norm_weight is None else added, norm_weight, output[2])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, d_stream: Tensor | None, d_normed: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    byte_ids, table, added, norm_weight, scale = ctx.saved_tensors
    if norm_weight is None or d_normed is None:
        norm_weight = d_normed = None
    wanted = ctx.needs_input_grad[1:4]
    wants = [wanted[0], wanted[1] and ctx.has_added, wanted[2] and norm_weight is not None]
    if (d_stream is None and d_normed is None) or not any(wants):
        return (None,) * 6
    grads = torch.ops.megabyte.byte_embedding_backward(
        d_stream, d_normed, byte_ids, table, added, norm_weight, scale, wants
    )
    return (None, *(grad if want else None for grad, want in zip(grads, wants, strict=True)), None, None)


_forward.register_autograd(_differentiate, setup_context=_keep)
