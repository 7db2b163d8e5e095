"""The byte mixers there are, by name, and a stack of them on one residual stream."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megabyte_distill.config.model import ByteMixer, ByteSideConfig
from megabyte_distill.kernels.segments import Segments
from megabyte_distill.model.byte_mixer import ByteMixerBlock
from megabyte_distill.model.conv_mixer import ConvMixerBlock
from megabyte_distill.model.linears import LinearFactory
from megabyte_distill.model.local_attention import LocalAttentionBlock
from megabyte_distill.model.mamba2 import Mamba2Block
from megabyte_distill.model.row_state import RowState, Span

MixerBuilder = Callable[[ByteSideConfig, int, LinearFactory], ByteMixerBlock]
"""(config, index of the layer in its stack, linears) -> block."""
MIXERS: MappingProxyType[ByteMixer, MixerBuilder] = MappingProxyType(
    {
        ByteMixer.MAMBA2: Mamba2Block,
        ByteMixer.CONV: ConvMixerBlock,
        ByteMixer.LOCAL_ATTENTION: LocalAttentionBlock,
    }
)
"""The registry, read-only: a new mixer is one file and one line here."""


@dataclass(frozen=True, slots=True)
class StackState(RowState):
    """One state a block."""

    blocks: tuple[RowState, ...]


@dataclass(frozen=True, slots=True)
class StackSpan:
    """A :class:`Span` a block."""

    blocks: tuple[Span[RowState], ...]

    def after(self, counts: Tensor) -> StackState:
        """The state behind the first ``counts`` [R] bytes."""
        return StackState(tuple(block.after(counts) for block in self.blocks))


class ByteMixerStack(nn.Module):
    """Blocks one after the other on one residual stream."""

    def __init__(self, config: ByteSideConfig, layers: int, linears: LinearFactory) -> None:
        super().__init__()
        build = MIXERS[ByteMixer(config.byte_mixer)]
        self.blocks = nn.ModuleList(build(config, layer, linears) for layer in range(layers))
        self.recomputes = False
        """Whether a block keeps its input alone in training, and computes the rest again in the backward pass."""

    def forward(self, x: Tensor, segments: Segments) -> Tensor:
        """[P, D] -> [P, D], both in the residual stream's dtype."""
        for block in self.blocks:
            if self.recomputes and self.training and torch.is_grad_enabled():
                x = checkpoint(block, x, segments, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, segments)
        return x

    def init_state(self, rows: int, device: torch.device) -> StackState:
        """The state of ``rows`` sequences that have not begun."""
        return StackState(tuple(block.init_state(rows, device) for block in self._typed()))

    def steps(self, x: Tensor, state: StackState) -> tuple[Tensor, StackSpan]:
        """The next T bytes of each row at once: [R, T, D] -> ([R, T, D], how the state goes on)."""
        spans = []
        for block, own in zip(self._typed(), state.blocks, strict=True):
            x, span = block.steps(x, own)
            spans.append(span)
        return x, StackSpan(tuple(spans))

    def step(self, x: Tensor, state: StackState) -> tuple[Tensor, StackState]:
        """One byte of each row: [R, D] -> ([R, D], the next state)."""
        following = []
        for block, own in zip(self._typed(), state.blocks, strict=True):
            x, own_next = block.step(x, own)
            following.append(own_next)
        return x, StackState(tuple(following))

    def _typed(self) -> list[ByteMixerBlock]:
        return [block for block in self.blocks if isinstance(block, ByteMixerBlock)]


def recompute_byte_mixers(module: nn.Module) -> None:
    """Let every stack of byte mixers in ``module`` recompute its blocks."""
    for part in module.modules():
        if isinstance(part, ByteMixerStack):
            part.recomputes = True
