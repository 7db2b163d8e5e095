"""What FP8 must cost: a model whose products get their weights, inputs and gradients rounded as FP8 rounds them."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor, nn


def rounded(x: Tensor, kind: torch.dtype) -> Tensor:
    """``x`` through an FP8 type and back, scaled so that its largest number is the type's largest."""
    scale = x.abs().max().clamp_min(1e-30).float() / torch.finfo(kind).max
    return ((x.float() / scale).to(kind).float() * scale).to(x.dtype)


class _RoundInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return rounded(x, torch.float8_e4m3fn)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class _RoundGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return rounded(grad, torch.float8_e5m2)


def round_as_fp8(module: nn.Module) -> nn.Module:
    """``module`` with megatron-core's linear layers rounded like ``--fp8-format hybrid --fp8-recipe tensorwise``."""
    for layer in module.modules():
        if isinstance(layer, ColumnParallelLinear | RowParallelLinear):
            layer.weight.data = rounded(layer.weight.data, torch.float8_e4m3fn)
            layer.register_forward_pre_hook(lambda _, args: (_RoundInput.apply(args[0]), *args[1:]))
            layer.register_forward_hook(lambda _, args, result: (_RoundGradient.apply(result[0]), *result[1:]))
    return module
