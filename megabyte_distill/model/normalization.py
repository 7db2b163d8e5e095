"""RMSNorm that computes in fp32 whatever it is given."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megabyte_distill.kernels.ops import accumulation_dtype, rms_norm
from megabyte_distill.model.linears import LinearFactory


class RMSNorm(nn.Module):
    """x / rms(x) · weight over the last axis; reads an fp32 residual stream and returns its weight's dtype."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """[.., width] -> [.., width] in the weight's dtype, ready for a linear layer of that dtype."""
        return rms_norm(x, self.weight, self.eps)


class SharedRMSNorm(nn.Module):
    """RMSNorm over a width of which each tensor-parallel rank has a part."""

    def __init__(self, width: int, eps: float, linears: LinearFactory) -> None:
        super().__init__()
        self.eps, self._width, self._linears = eps, width, linears
        self.weight = linears.cut(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """[.., width / shards] -> the same, in the weight's dtype."""
        if self._linears.shards == 1:
            return rms_norm(x, self.weight, self.eps)
        wide = x.to(accumulation_dtype(x.dtype))
        mean = self._linears.total(wide.square().sum(-1, keepdim=True)) / self._width
        return (wide * torch.rsqrt(mean + self.eps) * self.weight).to(self.weight.dtype)
