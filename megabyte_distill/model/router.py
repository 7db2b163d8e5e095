"""Where chunks end, from two neighbouring encoder states: one byte of lookahead."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megabyte_distill.alphabet import BOS_BYTE
from megabyte_distill.config.model import ByteSideConfig, RouterKind
from megabyte_distill.kernels.ops import boundary_bits, pair_cosine, routing_probabilities
from megabyte_distill.model.feed_forward import SwiGLU
from megabyte_distill.model.linears import LinearFactory, PlainLinears


class Router(nn.Module):
    """p_t = (1 − cos(q(r_t), k(r_{t+1}))) / 2 with projections E → E of the configured kind."""

    def __init__(self, config: ByteSideConfig, linears: LinearFactory | None = None) -> None:
        super().__init__()
        make, width = linears or PlainLinears(), config.backbone_width
        self.q, self.k = (_projection(RouterKind(config.router), width, config.router_hidden_size, make) for _ in "qk")

    def forward(self, r: Tensor, cu_seqlens: Tensor) -> Tensor:
        """p [P] fp32 for r [P, E]: probability that byte t ends a chunk, 1 at each segment's last byte."""
        return routing_probabilities(self.q(r), self.k(r), cu_seqlens)

    def step(self, r_previous: Tensor, r_next: Tensor) -> Tensor:
        """p [R] fp32 of the previous byte, known now that the next one is; both arguments [R, E]."""
        return ((1.0 - pair_cosine(self.q(r_previous), self.k(r_next))) / 2.0).clamp(0.0, 1.0)


def _projection(kind: RouterKind, width: int, hidden: int, make: LinearFactory) -> nn.Module:
    """[.., E] -> [.., E]."""
    if kind is RouterKind.OFFICIAL:
        return SwiGLU(width, hidden, width, make)
    # as in H-Net (hnet/modules/dc.py): at first a chunk ends where the encoder's own states turn
    return make.gathered(torch.eye(width))


def decide(
    p: Tensor, byte_ids: Tensor, threshold: float = 0.5, official: bool = False, is_text: Tensor | None = None
) -> Tensor:
    """bits [P] bool: p above the threshold, and BOS always ends a chunk except in the official way.

    A segment's last byte ends a chunk because its p is 1. With ``is_text`` [P] bool every run of PAD is one chunk.
    """
    return boundary_bits(p, byte_ids, is_text, threshold, None if official else BOS_BYTE)
