"""A byte mixer that attends to the last bytes of the document: a causal sliding window with rotary positions."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from megabyte_distill.config.model import ByteSideConfig
from megabyte_distill.kernels.segments import Segments
from megabyte_distill.model.byte_mixer import ByteMixerBlock
from megabyte_distill.model.linears import LinearFactory
from megabyte_distill.model.normalization import RMSNorm
from megabyte_distill.model.packed_attention import packed_attention
from megabyte_distill.model.rotary import inverse_frequencies, rotary_angles, rotate, turns
from megabyte_distill.model.row_state import RowState, window_after

ROPE_THETA = 1e4


@dataclass(frozen=True, slots=True)
class LocalAttentionState(RowState):
    """What the next byte can still attend to; W the window, I the width of this rank's heads."""

    keys: Tensor
    """[R, W−1, I], rotated, oldest first; what lies in front of the document is never read."""
    values: Tensor
    """[R, W−1, I]."""
    position: Tensor
    """[R] int64, of the next byte in its document."""


@dataclass(frozen=True, slots=True)
class LocalAttentionSpan:
    """A :class:`Span`."""

    keys: Tensor
    """[R, W−1 + T, I], those remembered before, then the new ones."""
    values: Tensor
    position: Tensor
    """[R] int64, of the first of the T bytes."""
    reach: int
    """W−1."""

    def after(self, counts: Tensor) -> LocalAttentionState:
        """The state behind the first ``counts`` [R] bytes."""
        keys, values = (window_after(window, self.reach, counts) for window in (self.keys, self.values))
        return LocalAttentionState(keys, values, self.position + counts)


class LocalAttentionBlock(ByteMixerBlock):
    """x + out(attention(q, k, v of norm(x))): a byte attends to ``byte_attention_window`` bytes, itself included."""

    def __init__(self, config: ByteSideConfig, layer: int, linears: LinearFactory) -> None:
        super().__init__()
        width, head_dim = config.byte_width, config.byte_attention_head_dim
        if width % head_dim or head_dim % 2:
            raise ValueError(
                f"byte_width = {width} is not a multiple of byte_attention_head_dim = {head_dim}, or that is odd; "
                "change one of them"
            )
        heads = width // head_dim
        if heads % linears.shards:
            raise ValueError(
                f"{heads} heads of local attention cannot be split over {linears.shards} tensor-parallel ranks; "
                "choose a --byte-attention-head-dim that gives more"
            )
        self.head_dim, self.window = head_dim, config.byte_attention_window
        self.norm = RMSNorm(width, config.norm_eps)
        self.q = linears.column(width, width)
        self.k = linears.column(width, width)
        self.v = linears.column(width, width)
        self.out = linears.row(width, width)
        # no buffer, which a bf16 cast would round, and not made here, where transformers builds on the meta device
        self._frequencies: Tensor | None = None

    def forward(self, x: Tensor, segments: Segments) -> Tensor:
        """[P, D] -> [P, D]; time and memory go with P · W."""
        rotations = segments.once(("rotations", self.head_dim), lambda: self._rotations(segments.position))
        query, key, value = self._projected(x, rotations)
        mixed = packed_attention(query, key, value, segments.lengths, self.window, cu_seqlens=segments.cu_seqlens)
        result: Tensor = x + self.out(mixed)
        return result

    def init_state(self, rows: int, device: torch.device) -> LocalAttentionState:
        """Nothing stands in front of a segment."""
        weight = self.q.get_parameter("weight")
        nothing = torch.zeros(rows, self.window - 1, weight.shape[0], device=device, dtype=weight.dtype)
        return LocalAttentionState(nothing, nothing.clone(), torch.zeros(rows, dtype=torch.int64, device=device))

    def steps(self, x: Tensor, state: LocalAttentionState) -> tuple[Tensor, LocalAttentionSpan]:
        """The next T bytes of each row at once: [R, T, D] -> ([R, T, D], how the state goes on)."""
        rows, length = x.shape[:2]
        positions = state.position[:, None] + torch.arange(length, device=x.device)
        projected = self._projected(x.flatten(0, 1), self._rotations(positions.flatten()))
        query, key, value = (part.view(rows, length, -1) for part in projected)
        keys, values = (torch.cat(pair, dim=1) for pair in ((state.keys, key), (state.values, value)))
        mixed = self._attend(query, keys, values, state.position)
        return x + self.out(mixed), LocalAttentionSpan(keys, values, state.position, self.window - 1)

    def step(self, x: Tensor, state: LocalAttentionState) -> tuple[Tensor, LocalAttentionState]:
        """One byte of each row: [R, D] -> ([R, D], the next state)."""
        mixed, span = self.steps(x[:, None], state)
        return mixed[:, 0], LocalAttentionState(span.keys[:, 1:], span.values[:, 1:], state.position + 1)

    def _projected(self, x: Tensor, rotations: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value [N, H, head_dim] of bytes [N, D], the first two rotated."""
        normed = self.norm(x)
        query, key, value = (self._by_head(part(normed)) for part in (self.q, self.k, self.v))
        return rotate(query, rotations), rotate(key, rotations), value

    def _attend(self, query: Tensor, keys: Tensor, values: Tensor, position: Tensor) -> Tensor:
        """T bytes [R, T, I] against the W−1 in front of them and each other, keys and values [R, W−1 + T, I]."""
        own, other = (torch.arange(part.shape[1], device=query.device) for part in (query, keys))
        in_window = (other >= own[:, None]) & (other < own[:, None] + self.window)
        in_document = other >= self.window - 1 - position[:, None]
        query, keys, values = (self._by_head(part).transpose(1, 2) for part in (query, keys, values))
        visible = (in_window & in_document[:, None])[:, None]
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=visible).transpose(1, 2).flatten(2)

    def _by_head(self, x: Tensor) -> Tensor:
        """[.., I] -> [.., H, head_dim]."""
        return x.view(*x.shape[:-1], x.shape[-1] // self.head_dim, self.head_dim)

    def _rotations(self, positions: Tensor) -> Tensor:
        """:func:`turns` [2, N, head_dim] of positions [N]."""
        if self._frequencies is None or self._frequencies.device != positions.device:
            self._frequencies = inverse_frequencies(self.head_dim, ROPE_THETA).double().to(positions.device)
        # a document has more bytes than fp32 has digits for their angles
        return turns((rotary_angles(positions, self._frequencies) % (2 * math.pi)).float())
