"""A key/value cache whose rows branch: what several rows have in common is kept once, and a branch copies no key."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from megabyte_distill.model.key_value_cache import KeyValueCache, NewPositions

_SMALLEST = 64
"""Positions a store has room for at first."""


@dataclass
class BranchingCache(KeyValueCache):
    """Rows are lists of places in a store that all share; a place is written once.

    ``keys[layer]``, ``values[layer]``: [S, groups, head_dim]; ``places`` [R, capacity] int64, of which row i uses the
    first ``lengths[i]``.
    """

    places: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.int64))
    used: int = 0
    """Places given away, of S."""
    _seen: set[int] = field(default_factory=set)
    """Layers that have written the positions of the present step."""
    _read: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.int64))
    """[K, longest] places that the rows of the present step attend to."""

    @classmethod
    def of(cls, cache: KeyValueCache, rows: Tensor) -> BranchingCache:
        """Rows [R] int64 of a plain cache; those taken several times share what they hold."""
        count = cache.lengths.shape[0]
        longest = int(cache.lengths.max())
        every = torch.arange(count * longest, device=rows.device).view(count, longest)
        return cls(
            lengths=cache.lengths[rows],
            keys={layer: k[:, :longest].flatten(0, 1) for layer, k in cache.keys.items()},
            values={layer: v[:, :longest].flatten(0, 1) for layer, v in cache.values.items()},
            places=every[rows],
            used=count * longest,
        )

    def plain(self, rows: Tensor) -> KeyValueCache:
        """A plain cache of rows [K] int64, which shares nothing with this one."""
        read = self.places[rows, : int(self.lengths[rows].max())]
        return KeyValueCache(
            lengths=self.lengths[rows],
            keys={layer: k[read] for layer, k in self.keys.items()},
            values={layer: v[read] for layer, v in self.values.items()},
        )

    def branch(self, source: Tensor, target: Tensor) -> None:
        """Rows ``target`` [N] become what rows ``source`` [N] are; the two are disjoint."""
        self.places[target] = self.places[source]
        self.lengths[target] = self.lengths[source]

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows [N] int64 only, in this order; a row may be taken several times."""
        self.places, self.lengths = self.places[rows], self.lengths[rows]

    def put(self, rows: Tensor, sub: KeyValueCache) -> None:
        """Overwrite the rows [N] int64 with those of a plain cache in order."""
        count, longest = rows.shape[0], int(sub.lengths.max())
        self.lengths[rows] = 0  # what they held may be dropped
        places = self._new_places(count * longest, longest)
        for own, other in ((self.keys, sub.keys), (self.values, sub.values)):
            for layer, stored in other.items():
                self._write(own, layer, places, stored[:, :longest].flatten(0, 1))
        self.places[rows, :longest] = places.view(count, longest)
        self.lengths[rows] = sub.lengths
        self._seen = set()

    def append(self, layer: int, new: NewPositions, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """As :class:`KeyValueCache`, one new position of each row."""
        count = new.rows.shape[0]
        if not self._seen or layer in self._seen:  # the first layer of a step
            self.places[new.rows, new.places] = self._new_places(count, new.needed)
            self._read = self.places[new.rows, : new.needed]
            self._seen = set()
        self._seen.add(layer)
        written = torch.arange(self.used - count, self.used, device=new.rows.device)
        self._write(self.keys, layer, written, keys)
        self._write(self.values, layer, written, values)
        return self.keys[layer][self._read], self.values[layer][self._read]

    def _new_places(self, count: int, longest: int) -> Tensor:
        """``count`` places that nothing uses, and room for rows of ``longest`` positions."""
        device = self.places.device
        if self.places.shape[1] < longest:
            room = max(32, 1 << (longest - 1).bit_length()) - self.places.shape[1]
            self.places = torch.nn.functional.pad(self.places, (0, room))
        size = next((store.shape[0] for store in self.keys.values()), 0)
        if self.used + count > size:
            self._compact(count)
        self.used += count
        return torch.arange(self.used - count, self.used, device=device)

    def _compact(self, count: int) -> None:
        """Forget the places that no row uses any more, and have room for at least as many again as are left."""
        index = torch.arange(self.places.shape[1], device=self.places.device)
        is_used = index < self.lengths[:, None]
        live, renumbered = torch.unique(self.places[is_used], return_inverse=True)
        self.places = torch.zeros_like(self.places)
        self.places[is_used] = renumbered
        self.used = live.shape[0]
        room = max(_SMALLEST, 2 * self.used) + count
        for stores in (self.keys, self.values):
            for layer, store in stores.items():
                grown = store.new_zeros(room, *store.shape[1:])
                grown[: self.used] = store[live]
                stores[layer] = grown

    def _write(self, stores: dict[int, Tensor], layer: int, places: Tensor, new: Tensor) -> None:
        if layer not in stores:
            stores[layer] = new.new_zeros(max(_SMALLEST, self.used), *new.shape[1:])
        stores[layer][places] = new
