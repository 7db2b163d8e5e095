"""Core attention of the backbone: packed segments in training, a key/value cache in stepping.

megatron's attention hands ``packed_seq_params`` through to its core attention untouched unless the format is "thd".
Both carriers below say "sbhd", and bring the rotary angles of their positions: this module rotates, since layers with
a sliding window may turn at other frequencies than the rest, and it alone knows what a segment or a cache is. It works
for every layer type that keeps megatron's SelfAttention.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megabyte_distill.config.model import BackboneConfig
from megabyte_distill.model.rotary import inverse_frequencies, rotary_angles, rotate, rotation_magnitude


class RotaryTable:
    """Angles of positions: one set for the layers that attend to everything, one for those with a window."""

    def __init__(self, config: BackboneConfig) -> None:
        # no buffers: a bf16 cast must not round them
        self._full = inverse_frequencies(
            config.head_dim, config.rope_theta, config.rope_scaling, config.rope_scaling_kind
        )
        self._sliding = inverse_frequencies(config.head_dim, config.rope_theta)
        self._has_sliding = bool(config.sliding_layers)

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """(angles [N, head_dim] of full layers, of sliding layers), fp32; the same where no layer slides."""
        if self._full.device != positions.device:
            self._full, self._sliding = self._full.to(positions.device), self._sliding.to(positions.device)
        full = rotary_angles(positions, self._full)
        return full, rotary_angles(positions, self._sliding) if self._has_sliding else full


@dataclass
class PackedSegments(PackedSeqParams):  # type: ignore[misc]
    """Causal attention inside each of several segments packed along the sequence."""

    qkv_format: str = "sbhd"
    lengths: list[int] = field(default_factory=list)
    """Segment lengths on the host, one copy for all layers."""
    angles: tuple[Tensor, Tensor] = ()  # type: ignore[assignment]
    """Of :class:`RotaryTable`."""

    @classmethod
    def of(cls, cu_seqlens: Tensor, angles: tuple[Tensor, Tensor]) -> PackedSegments:
        """Of cumulative lengths [S + 1]."""
        return cls(lengths=(cu_seqlens[1:] - cu_seqlens[:-1]).tolist(), angles=angles)


@dataclass
class KeyValueCache:
    """Keys and values of R rows, each as long as it has stepped. Grows by doubling.

    ``keys[layer]``, ``values[layer]``: [R, capacity, groups, head_dim]; ``lengths`` [R] int64.
    """

    lengths: Tensor
    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)

    @classmethod
    def empty(cls, rows: int, device: torch.device) -> KeyValueCache:
        """A cache of ``rows`` rows that have seen nothing."""
        return cls(lengths=torch.zeros(rows, dtype=torch.int64, device=device))

    def select(self, rows: Tensor) -> KeyValueCache:
        """A copy of some rows [K] int64 (a row may be taken several times)."""
        return KeyValueCache(
            lengths=self.lengths[rows],
            keys={layer: k[rows] for layer, k in self.keys.items()},
            values={layer: v[rows] for layer, v in self.values.items()},
        )

    def _room(self, store: dict[int, Tensor], layer: int, new: Tensor, needed: int) -> Tensor:
        old = store.get(layer)
        if old is not None and old.shape[1] >= needed:
            return old
        capacity = max(32, 1 << (needed - 1).bit_length())
        grown = new.new_zeros(self.lengths.shape[0], capacity, *new.shape[1:])
        if old is not None:
            grown[:, : old.shape[1]] = old
        store[layer] = grown
        return grown

    def append(self, layer: int, rows: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write one new position [K, groups, head_dim] of each row in ``rows`` [K]; return those rows' caches."""
        positions = self.lengths[rows]
        needed = int(positions.max()) + 1
        stored_keys = self._room(self.keys, layer, keys, needed)
        stored_values = self._room(self.values, layer, values, needed)
        stored_keys[rows, positions] = keys
        stored_values[rows, positions] = values
        return stored_keys[rows, :needed], stored_values[rows, :needed]


@dataclass
class CachedRows(PackedSeqParams):  # type: ignore[misc]
    """One step of the rows ``rows`` [K] of a :class:`KeyValueCache`."""

    qkv_format: str = "sbhd"
    cache: KeyValueCache | None = None
    rows: Tensor | None = None
    angles: tuple[Tensor, Tensor] = ()  # type: ignore[assignment]


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
        self.window = backbone.sliding_window if layer_number - 1 in backbone.sliding_layers else None
        slides = self.window is not None
        self.magnitude = 1.0 if slides else rotation_magnitude(backbone.rope_scaling, backbone.rope_scaling_kind)

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
        angles = packed_seq_params.angles[0 if self.window is None else 1]
        query, key = (rotate(x, angles, self.magnitude) for x in (query, key))
        if isinstance(packed_seq_params, CachedRows):
            return self._cached(query, key, value, packed_seq_params)
        repeat = query.shape[2] // key.shape[2]
        # [1, heads, N, d]
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        if repeat > 1:
            key, value = (x.repeat_interleave(repeat, dim=1) for x in (key, value))
        parts = [torch.split(x, packed_seq_params.lengths, dim=2) for x in (query, key, value)]
        out = [self._segment(q, k, v) for q, k, v in zip(*parts, strict=True)]
        joined = out[0] if len(out) == 1 else torch.cat(out, dim=2)
        return joined.permute(2, 0, 1, 3).reshape(joined.shape[2], 1, -1)

    def _segment(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Causal attention within one segment, [1, heads, L, d] each."""
        if self.window is not None and query.shape[2] > self.window:
            return windowed_attention(query, key, value, self.window, self.softmax_scale)
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=self.softmax_scale)

    def _cached(self, query: Tensor, key: Tensor, value: Tensor, step: CachedRows) -> Tensor:
        assert step.cache is not None and step.rows is not None
        # rows stand on the sequence axis: [K, 1, heads, d]
        keys, values = step.cache.append(self.layer_number, step.rows, key[:, 0], value[:, 0])
        places, now = torch.arange(keys.shape[1], device=keys.device), step.cache.lengths[step.rows][:, None]
        visible = places <= now
        if self.window is not None:
            visible &= places > now - self.window
        # grouped queries stand on the query axis of their group: no copy of keys and values
        grouped = query.view(query.shape[0], keys.shape[2], -1, query.shape[3])
        out = F.scaled_dot_product_attention(
            grouped,
            keys.transpose(1, 2),
            values.transpose(1, 2),
            attn_mask=visible[:, None, None, :],
            scale=self.softmax_scale,
        )
        return out.reshape(out.shape[0], 1, -1)


def windowed_attention(query: Tensor, key: Tensor, value: Tensor, window: int, scale: float | None = None) -> Tensor:
    """Causal attention to the last ``window`` positions, one's own included; [1, heads, L, d] each, memory L × window.

    Queries go in blocks of ``window``, each against its own block of keys and the one before.
    """
    heads, length, width = query.shape[1:]
    count = -(-length // window)
    padding = count * window - length
    query = F.pad(query, (0, 0, 0, padding)).view(heads, count, window, width).transpose(0, 1)
    key, value = (
        F.pad(x, (0, 0, window, padding)).unfold(2, 2 * window, window)[0].permute(1, 0, 3, 2) for x in (key, value)
    )
    own, other = torch.arange(window, device=query.device)[:, None], torch.arange(2 * window, device=query.device)
    visible = ((other > own) & (other <= own + window)).repeat(count, 1, 1, 1)
    visible[0, ..., :window] = False  # in front of the segment
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=visible, scale=scale)
    return out.transpose(0, 1).reshape(1, heads, count * window, width)[:, :, :length]
