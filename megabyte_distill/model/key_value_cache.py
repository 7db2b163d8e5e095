"""Keys and values of rows that step, and attention of new positions to them; in plain torch."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor


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
