"""F2: probabilities of boundaries from the router's projections in one launch, each way (csrc/routing.cu)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megabyte_distill.kernels.dispatch import FusedOp
from megabyte_distill.kernels.fused.arguments import (
    VECTORS,
    dtype_code,
    dtype_refusal,
    form_refusal,
    scratch,
    vector_refusal,
)
from megabyte_distill.kernels.library import library_for, prepared


def fused_routing_probabilities(q: Tensor, k: Tensor, cu_seqlens: Tensor) -> Tensor:
    """``ops.routing_probabilities`` in one kernel that reads q and k once; so does its backward."""
    p: Tensor = torch.ops.megabyte.routing(q, k, cu_seqlens)[0]
    return p


def refusal(q: Tensor, k: Tensor, cu_seqlens: Tensor) -> str | None:
    """Why the kernel cannot take these, or None."""
    return dtype_refusal(q, k) or vector_refusal(q.shape[1]) or form_refusal("k", k, tuple(q.shape))


FUSED = FusedOp(run=fused_routing_probabilities, refusal=refusal, limits=f"fp32 or bf16, {VECTORS}")


@torch.library.custom_op("megabyte::routing", mutates_args=())
def _forward(q: Tensor, k: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(p, 1/|q_t|, 1/|k_{t+1}|), each [P] fp32; the latter two are 0 where p is 1 by definition."""
    rows, width = q.shape
    p, inverse_q, inverse_k = scratch(q, rows), scratch(q, rows), scratch(q, rows)
    library_for(q).call(
        "routing_forward",
        prepared(q),
        prepared(k),
        prepared(cu_seqlens.to(torch.int32)),
        p,
        inverse_q,
        inverse_k,
        rows,
        width,
        cu_seqlens.shape[0] - 1,
        dtype_code(q),
    )
    return p, inverse_q, inverse_k


@_forward.register_fake
def _(q: Tensor, k: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return scratch(q, q.shape[0]), scratch(q, q.shape[0]), scratch(q, q.shape[0])


@torch.library.custom_op("megabyte::routing_backward", mutates_args=())
def _backward(
    d_p: Tensor, q: Tensor, k: Tensor, p: Tensor, inverse_q: Tensor, inverse_k: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of q and k, [P, E]."""
    rows, width = q.shape
    d_q, d_k = q.new_empty(rows, width), k.new_empty(rows, width)
    library_for(q).call(
        "routing_backward",
        prepared(d_p),
        prepared(q),
        prepared(k),
        p,
        inverse_q,
        inverse_k,
        d_q,
        d_k,
        rows,
        width,
        dtype_code(q),
    )
    return d_q, d_k


@_backward.register_fake
def _(d_p: Tensor, q: Tensor, k: Tensor, p: Tensor, inverse_q: Tensor, inverse_k: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, _ = inputs
    ctx.save_for_backward(q, k, *output)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, d_p: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, Tensor | None, None]:
    if d_p is None:
        return None, None, None
    d_q, d_k = torch.ops.megabyte.routing_backward(d_p, *ctx.saved_tensors)
    return d_q, d_k, None


_forward.register_autograd(_differentiate, setup_context=_keep)
