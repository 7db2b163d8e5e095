"""RMSNorm that computes in fp32 whatever it is given."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megabyte_distill.kernels.ops import rms_norm


class RMSNorm(nn.Module):
    """x / rms(x) · weight over the last axis; reads an fp32 residual stream and returns its weight's dtype."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """[.., width] -> [.., width] in the weight's dtype, ready for a linear layer of that dtype."""
        return rms_norm(x, self.weight, self.eps)
