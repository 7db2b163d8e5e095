"""The SwiGLU that heads the encoder, opens the decoder and serves as the router's projections; a teacher's gates."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch.nn.functional as F
from torch import Tensor, nn

from megabyte_distill.config.model import Activation
from megabyte_distill.kernels.ops import swiglu
from megabyte_distill.model.linears import LinearFactory, PlainLinears


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by its tanh approximation."""
    return F.gelu(x, approximate="tanh")


TEACHER_GATES: Mapping[Activation, Callable[[Tensor], Tensor]] = MappingProxyType(
    {Activation.SILU: F.silu, Activation.GELU_TANH: gelu_tanh}
)
"""The functions of a teacher's MLP."""


class SwiGLU(nn.Module):
    """out(value(x) · silu(gate(x))), no biases; value and gate are separate parameters, each sharded by itself."""

    def __init__(self, inputs: int, hidden: int, outputs: int, linears: LinearFactory | None = None) -> None:
        super().__init__()
        make = linears or PlainLinears()
        self.value = make.column(inputs, hidden)
        self.gate = make.column(inputs, hidden)
        self.out = make.row(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """[.., inputs] -> [.., outputs]."""
        result: Tensor = self.out(swiglu(self.value(x), self.gate(x)))
        return result
