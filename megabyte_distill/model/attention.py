"""Core attention of megatron's layers: packed segments in training, a key/value cache in stepping.

megatron's attention hands ``packed_seq_params`` through to its core attention untouched unless the format is "thd".
Both carriers below say "sbhd", and bring the rotations of their positions: this module rotates, since layers with
a sliding window may turn at other frequencies than the rest, and it alone knows what a segment or a cache is. It works
for every layer type that keeps megatron's SelfAttention. The mathematics is in ``packed_attention``
and ``key_value_cache``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megabyte_distill.config.model import BackboneConfig
from megabyte_distill.model.key_value_cache import KeyValueCache, NewPositions, cached_attention
from megabyte_distill.model.packed_attention import packed_attention
from megabyte_distill.model.rotary import LayerReach, rotate


@dataclass
class PackedSegments(PackedSeqParams):  # type: ignore[misc]
    """Causal attention inside each of several segments packed along the sequence."""

    qkv_format: str = "sbhd"
    lengths: list[int] = field(default_factory=list)
    """Segment lengths on the host, one copy for all layers."""
    cu_seqlens: Tensor | None = None
    """The same, cumulated, on the device [S + 1] int32."""
    rotations: tuple[Tensor, Tensor] = ()  # type: ignore[assignment]
    """Of :class:`RotaryTable`."""
    angles: tuple[Tensor, Tensor] | None = None
    """In the place of rotations, of its ``angles``, for layers that turn by them."""

    @classmethod
    def of(cls, cu_seqlens: Tensor) -> PackedSegments:
        """Of cumulative lengths [S + 1]; rotations are still to be set."""
        return cls(lengths=(cu_seqlens[1:] - cu_seqlens[:-1]).tolist(), cu_seqlens=cu_seqlens.to(torch.int32))


@dataclass
class CachedRows(PackedSeqParams):  # type: ignore[misc]
    """One step of a :class:`KeyValueCache`."""

    qkv_format: str = "sbhd"
    cache: KeyValueCache | None = None
    new: NewPositions | None = None
    rotations: tuple[Tensor, Tensor] = ()  # type: ignore[assignment]


class SegmentAttention(MegatronModule):  # type: ignore[misc]
    """Rotation and scaled dot-product attention for megatron's local layer spec, grouped queries included."""

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        *,
        backbone: BackboneConfig,
        softmax_scale: Any = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self.layer_number = layer_number
        self.softmax_scale = softmax_scale
        self.reach = LayerReach.of(backbone, layer_number - 1)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        *,
        packed_seq_params: PackedSeqParams,
        **_: Any,
    ) -> Tensor:
        """[N, 1, heads, d], [N, 1, groups, d] twice → [N, 1, heads · d]; N packed positions, or K rows of a cache."""
        assert isinstance(packed_seq_params, (PackedSegments, CachedRows))
        query, key = (self.rotated(x, packed_seq_params) for x in (query, key))
        if isinstance(packed_seq_params, PackedSegments):
            out = self.attend(query, key, value.squeeze(1), packed_seq_params)
        else:
            # rows stand on the sequence axis
            cache, new = packed_seq_params.cache, packed_seq_params.new
            assert cache is not None and new is not None
            out = cached_attention(
                query,
                key,
                value[:, 0],
                cache=cache,
                layer=self.layer_number,
                new=new,
                window=self.reach.window,
                scale=self.softmax_scale,
            )
        return out[:, None]

    def rotated(self, x: Tensor, carrier: PackedSegments | CachedRows) -> Tensor:
        """Heads [N, 1, heads, d] at their positions → [N, heads, d]."""
        # a squeezed axis costs its gradient nothing, an index would fill a tensor
        return rotate(x.squeeze(1), self.reach.choose(carrier.rotations))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, segments: PackedSegments) -> Tensor:
        """Rotated queries [N, heads, d], keys and values [N, groups, d] of packed segments → [N, heads · d]."""
        return packed_attention(
            query, key, value, segments.lengths, self.reach.window, self.softmax_scale, segments.cu_seqlens
        )
