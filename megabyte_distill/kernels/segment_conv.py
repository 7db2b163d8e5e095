"""Causal depthwise convolution whose taps never reach over a segment's start."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from megabyte_distill.kernels.segments import Segments

_SHORTEST_MEAN_SEGMENT = 64
"""Below this mean length the loop over segments costs more than masking whole rows."""


def segment_conv(x: Tensor, weight: Tensor, bias: Tensor | None, segments: Segments, dilation: int = 1) -> Tensor:
    """y_t = bias + Σ_k weight[:, K−1−k] · x_{t − k·dilation}, taps in front of the byte's segment counting as zero.

    Args:
        x: [P, C].
        weight: [C, K]; its last column multiplies the byte itself.
        bias: [C] or None.

    Returns:
        [P, C] in x's dtype (a low-precision x times fp32 weights is summed in fp32).
    """
    by_run = x.device.type == "cpu" and segments.count * _SHORTEST_MEAN_SEGMENT <= segments.length
    if by_run:
        result: Tensor = _ConvByRun.apply(x, weight, segments, dilation)  # type: ignore[no-untyped-call]
    else:
        result = _conv_by_mask(x, weight, segments, dilation)
    return (result if bias is None else result + bias).to(x.dtype)


def _conv_by_mask(x: Tensor, weight: Tensor, segments: Segments, dilation: int) -> Tensor:
    """Whole-row shifts under a mask: no host copy, a constant number of launches."""
    taps = weight.shape[1]
    result = x * weight[:, -1]
    for k in range(1, taps):
        offset = k * dilation
        if offset >= x.shape[0]:
            break
        shifted = F.pad(x[:-offset], (0, 0, offset, 0)).masked_fill(~segments.reach(offset)[:, None], 0.0)
        result = result + shifted * weight[:, taps - 1 - k]
    return result


class _ConvByRun(torch.autograd.Function):
    """Shift, multiply, add in place over each segment: no temporary per tap, which is what a CPU pays for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, segments: Segments, dilation: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.segments, ctx.dilation = segments, dilation
        taps = weight.shape[1]
        columns = weight.t().contiguous()
        result = x * columns[-1]
        for first, last in segments.bounds:
            for k in range(1, taps):
                offset = k * dilation
                if last - first > offset:
                    result[first + offset : last].addcmul_(x[first : last - offset], columns[taps - 1 - k])
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight = ctx.saved_tensors
        taps = weight.shape[1]
        columns = weight.t().contiguous()
        grad_x = grad * columns[-1]
        grad_columns = torch.zeros_like(columns)
        grad_columns[-1] = (grad * x).sum(0)
        for first, last in ctx.segments.bounds:
            for k in range(1, taps):
                offset = k * ctx.dilation
                if last - first > offset:
                    later, earlier = slice(first + offset, last), slice(first, last - offset)
                    grad_x[earlier].addcmul_(grad[later], columns[taps - 1 - k])
                    grad_columns[taps - 1 - k] += (grad[later] * x[earlier]).sum(0)
        return grad_x.to(x.dtype), grad_columns.t(), None, None
