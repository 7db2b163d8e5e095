"""F1's second form: byte rows plus hashed n-gram rows in one launch, with both gradients (csrc/ngram_embedding.cu)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megabyte_distill.config.model import MAX_NGRAM
from megabyte_distill.kernels.dispatch import FusedOp
from megabyte_distill.kernels.fused.arguments import (
    WIDTHS,
    dtype_code,
    dtype_refusal,
    form_refusal,
    scratch,
    width_refusal,
)
from megabyte_distill.kernels.library import library_for, prepared

_PIECE = 128
"""Places of the sorted order that are walked together (kPiece)."""


def fused_ngram_embedding(byte_ids: Tensor, indices: Tensor, table: Tensor, ngram_table: Tensor) -> Tensor:
    """``ops.ngram_embedding``; an id or an index outside its table gives a row of NaN, and no gradient is
    defined with it.
    """
    stream: Tensor = torch.ops.megabyte.ngram_embedding(byte_ids, indices, table, ngram_table)
    return stream


def refusal(byte_ids: Tensor, indices: Tensor, table: Tensor, ngram_table: Tensor) -> str | None:
    """Why the kernel cannot take these, or None."""
    if not 1 <= indices.shape[1] <= MAX_NGRAM:
        return f"got {indices.shape[1]} n-gram tables, expected 1 to {MAX_NGRAM}"
    rows, width = byte_ids.shape[0], table.shape[1]
    return (
        dtype_refusal(table, ngram_table)
        or width_refusal(width)
        or form_refusal("byte_ids", byte_ids, (rows,), torch.int64)
        or form_refusal("indices", indices, (rows, indices.shape[1]), torch.int64)
        or form_refusal("ngram_table", ngram_table, (ngram_table.shape[0], width))
    )


FUSED = FusedOp(run=fused_ngram_embedding, refusal=refusal, limits=f"fp32 or bf16, {WIDTHS}, up to {MAX_NGRAM} tables")


@torch.library.custom_op("megabyte::ngram_embedding", mutates_args=())
def _forward(byte_ids: Tensor, indices: Tensor, table: Tensor, ngram_table: Tensor) -> Tensor:
    """Residual stream [P, D] fp32."""
    rows, width = byte_ids.shape[0], table.shape[1]
    stream = scratch(table, rows, width)
    library_for(table).call(
        "ngram_embedding_forward",
        prepared(byte_ids),
        prepared(indices),
        prepared(table),
        prepared(ngram_table),
        stream,
        rows,
        width,
        table.shape[0],
        ngram_table.shape[0],
        indices.shape[1],
        dtype_code(table),
    )
    return stream


@_forward.register_fake
def _(byte_ids: Tensor, indices: Tensor, table: Tensor, ngram_table: Tensor) -> Tensor:
    return scratch(table, byte_ids.shape[0], table.shape[1])


@torch.library.custom_op("megabyte::ngram_embedding_backward", mutates_args=())
def _backward(d_stream: Tensor, indices: Tensor, ngram_table: Tensor) -> Tensor:
    """Gradient of the n-gram table [N, D] from the stream's [P, D] in the table's dtype."""
    assert d_stream.dtype == ngram_table.dtype, (d_stream.dtype, ngram_table.dtype)
    size, width = ngram_table.shape
    # a radix sort takes as many passes as a key has bytes
    values, order = indices.flatten().to(torch.int32).sort(stable=True)
    runs = torch.searchsorted(values, torch.arange(size + 1, device=indices.device, dtype=torch.int32))
    d_ngram_table = ngram_table.new_empty(size, width)
    library_for(ngram_table).call(
        "ngram_embedding_backward",
        prepared(d_stream),
        values,
        order,
        runs,
        scratch(ngram_table, -(-values.shape[0] // _PIECE), 2, width),
        d_ngram_table,
        width,
        values.shape[0],
        size,
        indices.shape[1],
        dtype_code(ngram_table),
    )
    return d_ngram_table


@_backward.register_fake
def _(d_stream: Tensor, indices: Tensor, ngram_table: Tensor) -> Tensor:
    return ngram_table.new_empty(ngram_table.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, d_stream: Tensor) -> tuple[Tensor | None, ...]:
    byte_ids, indices, table, ngram_table = ctx.saved_tensors
    d_table = d_ngram_table = None
    of_table, of_ngrams = ctx.needs_input_grad[2:]
    if of_table:
        # the pass that reads the stream's gradient rounds it, too: every table's sum reads half as much
        wants = [True, of_ngrams and table.dtype != d_stream.dtype, False]
        d_table, rounded, _ = torch.ops.megabyte.byte_embedding_backward(
            d_stream, None, byte_ids, table, None, None, scratch(table, 0), wants
        )
        d_stream = rounded if wants[1] else d_stream
    if of_ngrams:
        d_ngram_table = torch.ops.megabyte.ngram_embedding_backward(
            d_stream.to(ngram_table.dtype), indices, ngram_table
        )
    return None, None, d_table, d_ngram_table


_forward.register_autograd(_differentiate, setup_context=_keep)
