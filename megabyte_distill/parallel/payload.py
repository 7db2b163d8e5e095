"""What a pipeline stage hands to the next one: one flat tensor a micro-batch, and its way back as a gradient.

megatron's schedules send one 3-D tensor of one dtype. Several parts travel in it, one behind the other, without a
header: every stage has the row and knows the sizes. A part of a wider dtype travels bit by bit, so that fp32 in a bf16
payload is not rounded, in either direction.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Part(NamedTuple):
    """Shape and dtype of one part of a payload."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def elements(self, carrier: torch.dtype) -> int:
        """Elements of the payload's dtype that it takes. ValueError for a dtype narrower than the payload's."""
        if self.dtype.itemsize % carrier.itemsize:
            raise ValueError(f"a payload in {carrier} cannot carry {self.dtype}")
        return math.prod(self.shape) * (self.dtype.itemsize // carrier.itemsize)


def pack(parts: Sequence[Tensor], dtype: torch.dtype, anchor: Tensor | None = None) -> Tensor:
    """The payload [N, 1, 1] in ``dtype`` of parts in order of falling width of their dtypes.

    ``anchor``: a scalar through which a gradient (zero) goes back although no part needs one.
    """
    return _Pack.apply(dtype, anchor, *parts)  # type: ignore[no-any-return,no-untyped-call]


def unpack(payload: Tensor, parts: Sequence[Part]) -> tuple[Tensor, ...]:
    """The parts of a payload that :func:`pack` made; ValueError where they do not add up to it."""
    sizes = [part.elements(payload.dtype) for part in parts]
    if sum(sizes) != payload.numel():
        raise ValueError(
            f"pipeline stages disagree on a micro-batch: {payload.numel()} elements arrived, expected {sum(sizes)} for "
            f"{[tuple(part.shape) for part in parts]}; they must see the same row and the same boundaries"
        )
    return _Unpack.apply(payload, tuple(parts))  # type: ignore[no-any-return,no-untyped-call]


def touch(x: Tensor) -> Tensor:
    """A zero, fp32 scalar, whose backward gives ``x`` a gradient of zeros: schedules wait for one in any case."""
    return _Touch.apply(x)  # type: ignore[no-any-return,no-untyped-call]


def _carried(part: Tensor, carrier: torch.dtype) -> Tensor:
    """The part's bits as [n, 1, 1] of the payload's dtype."""
    return part.detach().contiguous().view(-1).view(carrier).view(-1, 1, 1)


def _pieces(payload: Tensor, parts: Sequence[Part]) -> list[Tensor]:
    """The parts as views into a payload."""
    flat = payload.detach().reshape(-1)
    sizes = [part.elements(payload.dtype) for part in parts]
    return [
        piece.view(part.dtype).view(part.shape) for piece, part in zip(torch.split(flat, sizes), parts, strict=True)
    ]


class _Pack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, anchor: Tensor | None, *parts: Tensor) -> Tensor:
        ctx.parts = tuple(Part(tuple(part.shape), part.dtype) for part in parts)
        # cat makes a tensor of its own: the schedule frees it once it is sent, which it cannot do to a view
        return torch.cat([_carried(part, dtype) for part in parts])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        pieces = _pieces(grad, ctx.parts)
        wanted = ctx.needs_input_grad
        anchor = torch.zeros((), device=grad.device) if wanted[1] else None
        return None, anchor, *(piece if need else None for piece, need in zip(pieces, wanted[2:], strict=True))


class _Unpack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, payload: Tensor, parts: tuple[Part, ...]) -> tuple[Tensor, ...]:
        ctx.parts, ctx.dtype, ctx.device = parts, payload.dtype, payload.device
        ctx.set_materialize_grads(False)
        return tuple(_pieces(payload, parts))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor, None]:
        full = [
            torch.zeros(part.shape, dtype=part.dtype, device=ctx.device) if grad is None else grad
            for grad, part in zip(grads, ctx.parts, strict=True)
        ]
        return torch.cat([_carried(grad, ctx.dtype) for grad in full]), None


class _Touch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.like = Part(tuple(x.shape), x.dtype)
        return torch.zeros((), device=x.device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return torch.zeros(ctx.like.shape, dtype=ctx.like.dtype, device=grad.device)
