"""RMSNorm that computes in fp32 whatever it is given."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
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


class TeacherRMSNorm(nn.RMSNorm):
    """torch's RMSNorm, of a teacher's layers; ``zero_centred``: x / rms(x) · (1 + weight), rounded once (Gemma)."""

    def __init__(self, width: int, *, eps: float, zero_centred: bool) -> None:
        self.zero_centred = zero_centred  # first: the next line resets the weight
        super().__init__(width, eps=eps)

    def reset_parameters(self) -> None:
        """The weight with which nothing is scaled."""
        nn.init.constant_(self.weight, 0.0 if self.zero_centred else 1.0)

    def forward(self, x: Tensor) -> Tensor:
        """[.., width] -> the same, in x's dtype."""
        if not self.zero_centred:
            return super().forward(x)
        # 1 + weight in bf16 would lose most of the weight
        wide = x.to(accumulation_dtype(x.dtype))
        normed: Tensor = F.rms_norm(wide, self.normalized_shape, 1.0 + self.weight.to(wide.dtype), self.eps)
        return normed.type_as(x)


def multiplier(norm: Any) -> Tensor:
    """What a norm of a teacher's layers multiplies by, of its weight's shape."""
    weight: Tensor = norm.weight
    return 1.0 + weight if getattr(norm, "zero_centred", False) else weight


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
