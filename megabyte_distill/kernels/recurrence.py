"""The linear recurrence y_j = a_j · y_{j−1} + u_j over long sequences, in blocks of matrix products.

The weights between two rows are products of decays, taken as differences of summed logarithms in fp64 (they are
scalars, so this costs nothing) and masked before the exponential; a decay of exactly zero is a reset and never meets a
logarithm.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_BLOCK = 32


def linear_recurrence(decay: Tensor, update: Tensor) -> Tensor:
    """y with y_j = decay_j · y_{j−1} + update_j and y_{−1} = 0, differentiable in both arguments.

    Args:
        decay: [M, H], non-negative; 0 forgets everything before.
        update: [M, H, F], fp32 or fp64.

    Returns:
        [M, H, F] in update's dtype.
    """
    with torch.autocast(update.device.type, enabled=False):
        result: Tensor = _LinearRecurrence.apply(decay, update)  # type: ignore[no-untyped-call]
    return result


class _LinearRecurrence(torch.autograd.Function):
    """The gradient is the same recurrence backwards, so no block of weights is kept."""

    @staticmethod
    def forward(ctx: Any, decay: Tensor, update: Tensor) -> Tensor:
        result = _scan(decay.to(torch.float64), update)
        ctx.save_for_backward(decay, result)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor]:
        decay, result = ctx.saved_tensors
        following = torch.cat((decay[1:], torch.zeros_like(decay[:1])))
        grad_update = _scan(following.flip(0).to(torch.float64), grad.flip(0)).flip(0)
        grad_decay = None
        if ctx.needs_input_grad[0]:
            grad_decay = torch.zeros_like(decay)
            grad_decay[1:] = (grad_update[1:] * result[:-1]).sum(-1).to(decay.dtype)
        return grad_decay, grad_update


def _scan(decay: Tensor, update: Tensor) -> Tensor:
    """The recurrence without gradients; decay [M, H] fp64, update [M, H, F]."""
    rows, heads, features = update.shape
    if rows == 0:
        return update.clone()
    size = min(_BLOCK, rows)
    padding = -rows % size
    decay = torch.nn.functional.pad(decay, (0, 0, 0, padding)).view(-1, size, heads).transpose(1, 2)
    blocks = torch.nn.functional.pad(update, (0, 0, 0, 0, 0, padding)).view(-1, size, heads, features).transpose(1, 2)
    reset = decay <= 0
    logs = torch.where(reset, 1.0, decay).log().cumsum(-1)
    group = reset.to(torch.int64).cumsum(-1)
    hidden = (group[..., :, None] != group[..., None, :]) | torch.ones(
        size, size, dtype=torch.bool, device=decay.device
    ).triu(1)
    weights = (logs[..., :, None] - logs[..., None, :]).masked_fill_(hidden, -torch.inf).exp_()
    result = torch.matmul(weights.to(update.dtype), blocks)
    if result.shape[0] > 1:
        reach = (logs.exp() * (group == 0)).to(torch.float64)
        ends = _scan(reach[..., -1], result[:, :, -1])
        result[1:] += reach[1:, :, :, None].to(update.dtype) * ends[:-1, :, None]
    return result.transpose(1, 2).reshape(-1, heads, features)[:rows]
