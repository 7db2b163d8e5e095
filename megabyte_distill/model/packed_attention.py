"""Attention of the backbone in plain torch: packed segments, a key/value cache for stepping, angles of positions.

megatron's layers in training and the transformer of a Hugging Face export both call this file.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megabyte_distill.config.model import BackboneConfig
from megabyte_distill.model.rotary import inverse_frequencies, rotary_angles, rotation_magnitude, turns


class RotaryTable:
    """Rotations of positions: one set for the layers that attend to everything, one for those with a window."""

    def __init__(self, config: BackboneConfig) -> None:
        # no buffers: a bf16 cast must not round them
        self._full = inverse_frequencies(
            config.head_dim, config.rope_theta, config.rope_scaling, config.rope_scaling_kind
        )
        self._sliding = inverse_frequencies(config.head_dim, config.sliding_rope_theta or config.rope_theta)
        self._has_sliding = bool(config.sliding_layers)
        self._magnitude = rotation_magnitude(config.rope_scaling, config.rope_scaling_kind)

    @property
    def frequencies(self) -> tuple[Tensor, Tensor, float]:
        """(radians a position of full layers [head_dim / 2], of sliding layers, factor on the full layers' turns)."""
        return self._full, self._sliding, self._magnitude

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """(turns [2, N, head_dim] of full layers, of sliding layers), fp32; the same where no layer slides.

        Layers with a window turn at unscaled frequencies, of a base of their own where the configuration has one.
        """
        if self._full.device != positions.device:
            self._full, self._sliding = self._full.to(positions.device), self._sliding.to(positions.device)
        full = turns(rotary_angles(positions, self._full), self._magnitude)
        return full, turns(rotary_angles(positions, self._sliding)) if self._has_sliding else full


@dataclass(frozen=True, slots=True)
class LayerReach:
    """What a layer attends to."""

    window: int | None
    """Positions, its own included; None attends to everything before."""

    @classmethod
    def of(cls, config: BackboneConfig, layer: int) -> LayerReach:
        """Of a layer counted from 0."""
        return cls(config.sliding_window if layer in config.sliding_layers else None)

    def choose(self, rotations: tuple[Tensor, Tensor]) -> Tensor:
        """The layer's own of :class:`RotaryTable`'s two sets."""
        return rotations[0 if self.window is None else 1]


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

    def put(self, rows: Tensor, sub: KeyValueCache) -> None:
        """Overwrite the rows [K] int64 with those of ``sub`` in order, in place."""
        used = int(sub.lengths.max())
        for own, other in ((self.keys, sub.keys), (self.values, sub.values)):
            for layer, stored in other.items():
                self._room(own, layer, stored, used)[rows, :used] = stored[:, :used]
        self.lengths[rows] = sub.lengths

    def _room(self, store: dict[int, Tensor], layer: int, new: Tensor, needed: int) -> Tensor:
        """A layer's store [R, at least ``needed``, groups, head_dim]; ``new`` [.., groups, head_dim] gives the rest."""
        old = store.get(layer)
        if old is not None and old.shape[1] >= needed:
            return old
        capacity = max(32, 1 << (needed - 1).bit_length())
        grown = new.new_zeros(self.lengths.shape[0], capacity, *new.shape[-2:])
        if old is not None:
            grown[:, : old.shape[1]] = old
        store[layer] = grown
        return grown

    def append(self, layer: int, new: NewPositions, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write new positions [N, groups, head_dim]; returns the rows that got some, [K, needed, groups, head_dim]."""
        stored_keys = self._room(self.keys, layer, keys, new.needed)
        stored_values = self._room(self.values, layer, values, new.needed)
        stored_keys[new.rows, new.places] = keys
        stored_values[new.rows, new.places] = values
        if new.is_every_row:
            return stored_keys[:, : new.needed], stored_values[:, : new.needed]
        return stored_keys[new.grown, : new.needed], stored_values[new.grown, : new.needed]


@dataclass
class NewPositions:
    """N positions that K rows of a :class:`KeyValueCache` get in one step, at most T each; all layers read it."""

    rows: Tensor
    """[N] int64, which row each belongs to; one with several stands several times."""
    places: Tensor
    """[N] int64, where in its row."""
    needed: int
    """One more than the largest place."""
    grown: Tensor
    """[K] int64, the distinct rows."""
    is_every_row: bool
    """Whether ``grown`` is 0, 1, … R − 1."""
    most: int = 1
    """T."""
    slots: Tensor | None = None
    """[N] int64, where each stands among [K, T]; None where that is 0, 1, … N − 1."""
    _masks: dict[int | None, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, cache: KeyValueCache, rows: Tensor, offsets: Tensor | None = None) -> NewPositions:
        """Behind what the rows hold, ``offsets`` [N] int64 further on (default: 0)."""
        every = torch.arange(cache.lengths.shape[0], device=rows.device)
        grown, most, slots, places = rows, 1, None, cache.lengths[rows]
        if offsets is not None:
            places, most = places + offsets, int(offsets.max()) + 1
            if most > 1:
                grown, row = torch.unique(rows, return_inverse=True)
                slots = row * most + offsets
        return cls(rows, places, int(places.max()) + 1, grown, torch.equal(grown, every), most, slots)

    def spread(self, values: Tensor) -> Tensor:
        """Values [N, ..] of the positions as [K, T, ..], zero where a row gets fewer than T."""
        count = self.grown.shape[0]
        if self.slots is not None:
            values = values.new_zeros(count * self.most, *values.shape[1:]).index_copy_(0, self.slots, values)
        return values.view(count, self.most, *values.shape[1:])

    def gather(self, values: Tensor) -> Tensor:
        """The inverse of :meth:`spread`."""
        values = values.flatten(0, 1)
        return values if self.slots is None else values[self.slots]

    def visible(self, window: int | None, dtype: torch.dtype, heads: int) -> Tensor:
        """[K, 1, heads · T, needed], 0 where a position may be attended to and −inf elsewhere; T = 1 fits any heads."""
        if window not in self._masks:
            others, places = torch.arange(self.needed, device=self.places.device), self.spread(self.places)[..., None]
            hidden = others > places
            if window is not None:
                hidden |= others <= places - window
            mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)
            self._masks[window] = mask[:, None] if self.most == 1 else mask.repeat(1, heads, 1)[:, None]
        return self._masks[window]


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Sequence[int],
    window: int | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Causal attention inside each of several segments, grouped queries included.

    Args:
        query: [N, heads, d], rotated.
        key, value: [N, groups, d].
        lengths: of the segments, N in all.
        window: positions each attends to, its own included; None for all.
        scale: of the products; default 1 / √d.
        cu_seqlens: [S + 1] int32, the lengths cumulated, where they are at hand on the device: on a GPU all segments go
            through torch's flash attention in one call then, in bf16 and fp16.

    Returns:
        [N, heads · d].
    """
    if cu_seqlens is not None and _flash_takes(query):
        return _flash(query, key, value, cu_seqlens, max(lengths, default=0), window, scale)
    if query.shape[0] == 0:
        return query.flatten(1)
    key, value = (_one_per_head(x, query) for x in (key, value))
    # [1, heads, N, d]
    query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
    parts = [torch.split(x, list(lengths), dim=2) for x in (query, key, value)]
    out = [_segment(q, k, v, window, scale) for q, k, v in zip(*parts, strict=True)]
    joined = out[0] if len(out) == 1 else torch.cat(out, dim=2)
    return joined[0].transpose(0, 1).reshape(joined.shape[2], -1)


def _one_per_head(x: Tensor, query: Tensor) -> Tensor:
    """Keys or values [N, groups, d], repeated so that each head of the query has its own."""
    repeat = query.shape[1] // x.shape[1]
    return x.repeat_interleave(repeat, dim=1) if repeat > 1 else x


@functools.cache
def _flash_options() -> frozenset[str] | None:
    """Names of the arguments of torch's attention over packed segments; None where this torch has none with windows."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    names = frozenset(inspect.signature(varlen_attn).parameters)
    return names if "window_size" in names else None


def _flash_takes(query: Tensor) -> bool:
    """Whether the fused attention can run: torch 2.11 or newer, a GPU, 16 bits, heads of up to 256."""
    fits = query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and query.shape[0] > 0
    return fits and query.shape[2] % 8 == 0 and query.shape[2] <= 256 and _flash_options() is not None


def _flash(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, longest: int, window: int | None, scale: float | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = {"window_size": (-1 if window is None else window - 1, 0), "scale": scale}
    if "enable_gqa" in (_flash_options() or ()):
        options["enable_gqa"] = key.shape[1] != query.shape[1]
    else:
        key, value = (_one_per_head(x, query) for x in (key, value))
    out = varlen_attn(query, key, value, cu_seqlens, cu_seqlens, longest, longest, **options)
    assert isinstance(out, Tensor)  # no auxiliary results were asked for
    return out.reshape(out.shape[0], -1)


def _segment(query: Tensor, key: Tensor, value: Tensor, window: int | None, scale: float | None) -> Tensor:
    """Causal attention within one segment, [1, heads, L, d] each."""
    if window is not None and query.shape[2] > window:
        return windowed_attention(query, key, value, window, scale)
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)


def cached_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    cache: KeyValueCache,
    layer: int,
    new: NewPositions,
    window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """New positions of a cache against what their rows hold and each other; writes keys and values.

    query [N, heads, d], rotated; key and value [N, groups, d]; returns [N, heads · d]. The lengths stay: they move
    on when all layers are through.
    """
    keys, values = cache.append(layer, new, key, value)
    rows, _, groups, width = keys.shape
    # the positions of a row and the heads of a group stand on one query axis: no copy of keys and values for either
    grouped = new.spread(query).view(rows, new.most, groups, -1, width).permute(0, 2, 3, 1, 4)
    out = F.scaled_dot_product_attention(
        grouped.reshape(rows, groups, -1, width),
        keys.transpose(1, 2),
        values.transpose(1, 2),
        attn_mask=new.visible(window, query.dtype, grouped.shape[2]),
        scale=scale,
    )
    out = out.view(grouped.shape).permute(0, 3, 1, 2, 4)
    return new.gather(out.reshape(rows, new.most, -1))


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
