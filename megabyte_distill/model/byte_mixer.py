"""What a layer that mixes bytes along the sequence must offer; the blocks there are stand in ``byte_stack``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from megabyte_distill.kernels.segments import Segments
from megabyte_distill.model.row_state import RowState, Span


class ByteMixerBlock(nn.Module, ABC):
    """A pre-norm residual block on an fp32 stream; segments of a row never see each other."""

    @abstractmethod
    def forward(self, x: Tensor, segments: Segments) -> Tensor:
        """The updated residual stream, x [P, D] -> [P, D] in x's dtype."""

    @abstractmethod
    def init_state(self, rows: int, device: torch.device) -> RowState:
        """The state in front of a segment's first byte, for ``rows`` sequences."""

    @abstractmethod
    def steps(self, x: Tensor, state: Any) -> tuple[Tensor, Span[Any]]:
        """The next T bytes of each row at once: x [R, T, D] -> ([R, T, D], how the state goes on)."""

    @abstractmethod
    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """One byte of each row: x [R, D] -> ([R, D], the next state); the state passed in stays as it is."""
