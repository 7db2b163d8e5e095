"""A byte mixer made of a dilated gated convolution and a gated MLP: the cheap choice where training runs on a CPU."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megabyte_distill.config.model import ByteSideConfig
from megabyte_distill.kernels.ops import segment_conv, swiglu
from megabyte_distill.kernels.segments import Segments
from megabyte_distill.model.byte_mixer import ByteMixerBlock
from megabyte_distill.model.feed_forward import SwiGLU
from megabyte_distill.model.linears import LinearFactory
from megabyte_distill.model.normalization import RMSNorm
from megabyte_distill.model.row_state import RowState, window_after


@dataclass(frozen=True, slots=True)
class ConvMixerState(RowState):
    """The values that the taps can still reach."""

    past: Tensor
    """[R, (K−1) · dilation, D], oldest first."""


@dataclass(frozen=True, slots=True)
class ConvMixerSpan:
    """A :class:`Span`."""

    window: Tensor
    """[R, (K−1) · dilation + T, D], oldest first."""
    reach: int
    """(K−1) · dilation."""

    def after(self, counts: Tensor) -> ConvMixerState:
        """The state behind the first ``counts`` [R] bytes."""
        return ConvMixerState(window_after(self.window, self.reach, counts))


class ConvMixerBlock(ByteMixerBlock):
    """x + out(conv(value) · silu(gate)), then x + SwiGLU(x), each behind its own RMSNorm.

    The convolution is depthwise and causal with ``conv_kernel`` taps; layer i takes ``conv_dilations`` in turn.
    """

    def __init__(self, config: ByteSideConfig, layer: int, linears: LinearFactory) -> None:
        super().__init__()
        width, taps = config.byte_width, config.conv_kernel
        if not config.conv_dilations or min(config.conv_dilations) < 1:
            raise ValueError(f"conv_dilations = {config.conv_dilations}; give at least one dilation, all of them ≥ 1")
        self.dilation = config.conv_dilations[layer % len(config.conv_dilations)]
        self.norm = RMSNorm(width, config.norm_eps)
        self.value = linears.column(width, width)
        self.gate = linears.column(width, width)
        bound = 1.0 / math.sqrt(taps)
        self.conv_weight = linears.cut(torch.empty(width, taps).uniform_(-bound, bound))
        self.out = linears.row(width, width)
        self.ffn_norm = RMSNorm(width, config.norm_eps)
        self.ffn = SwiGLU(width, config.conv_ffn_hidden_size, width, linears)

    def forward(self, x: Tensor, segments: Segments) -> Tensor:
        """[P, D] -> [P, D]."""
        normed = self.norm(x)
        mixed = segment_conv(self.value(normed), self.conv_weight, None, segments, self.dilation)
        x = x + self.out(swiglu(mixed, self.gate(normed)))
        result: Tensor = x + self.ffn(self.ffn_norm(x))
        return result

    def init_state(self, rows: int, device: torch.device) -> ConvMixerState:
        """Zeros: nothing stands in front of a segment."""
        channels, taps = self.conv_weight.shape
        reach = (taps - 1) * self.dilation
        return ConvMixerState(torch.zeros(rows, reach, channels, device=device, dtype=self.conv_weight.dtype))

    def steps(self, x: Tensor, state: ConvMixerState) -> tuple[Tensor, ConvMixerSpan]:
        """The next T bytes of each row at once: [R, T, D] -> ([R, T, D], how the state goes on)."""
        normed = self.norm(x)
        value: Tensor = self.value(normed)
        window = torch.cat((state.past, value.to(state.past.dtype)), dim=1)
        taps, length = self.conv_weight.shape[1], x.shape[1]
        mixed = torch.zeros_like(value)
        for tap in range(taps):
            mixed = mixed + window[:, tap * self.dilation :][:, :length] * self.conv_weight[:, tap]
        x = x + self.out(swiglu(mixed, self.gate(normed)))
        return x + self.ffn(self.ffn_norm(x)), ConvMixerSpan(window, state.past.shape[1])

    def step(self, x: Tensor, state: ConvMixerState) -> tuple[Tensor, ConvMixerState]:
        """One byte of each row: [R, D] -> ([R, D], the next state)."""
        normed = self.norm(x)
        value: Tensor = self.value(normed)
        window = torch.cat((state.past, value[:, None].to(state.past.dtype)), dim=1)
        mixed = (window[:, :: self.dilation] * self.conv_weight.t()).sum(1)
        x = x + self.out(swiglu(mixed, self.gate(normed)))
        return x + self.ffn(self.ffn_norm(x)), ConvMixerState(window[:, 1:])
