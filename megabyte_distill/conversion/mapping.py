"""How a parameter of the backbone relates to tensors of a Hugging Face folder, in both directions; tables of these.

"Theirs" is the Hugging Face side, "ours" the names of :class:`megabyte_distill.model.backbone.Backbone`. Every mapping
knows the exact shapes of both sides, so a table can say what is missing, extra or of another shape before any is read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

Shape = tuple[int, ...]
_SHOWN = 12


class ParameterMapping(Protocol):
    """One tensor of ours made of one or more of theirs."""

    @property
    def ours(self) -> str:
        """Name in the backbone."""
        ...

    @property
    def shape(self) -> Shape:
        """Shape in the backbone, whole (not a tensor-parallel shard)."""
        ...

    @property
    def theirs(self) -> dict[str, Shape]:
        """Names and shapes in the Hugging Face folder, in the order :meth:`to_ours` takes them."""
        ...

    def to_ours(self, parts: Sequence[Tensor]) -> Tensor:
        """Our tensor of theirs; may share memory with them."""
        ...

    def to_theirs(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Inverse of :meth:`to_ours`, bit for bit."""
        ...


@dataclass(frozen=True, slots=True)
class Direct:
    """The same tensor under another name."""

    ours: str
    name: str
    shape: Shape

    @property
    def theirs(self) -> dict[str, Shape]:
        return {self.name: self.shape}

    def to_ours(self, parts: Sequence[Tensor]) -> Tensor:
        return parts[0]

    def to_theirs(self, tensor: Tensor) -> tuple[Tensor, ...]:
        return (tensor,)


@dataclass(frozen=True, slots=True, kw_only=True)
class PerHead:
    """A vector over all heads, [heads · head_dim], as a matrix [heads, head_dim], which is cut by heads."""

    ours: str
    name: str
    heads: int
    head_dim: int

    @property
    def shape(self) -> Shape:
        return (self.heads, self.head_dim)

    @property
    def theirs(self) -> dict[str, Shape]:
        return {self.name: (self.heads * self.head_dim,)}

    def to_ours(self, parts: Sequence[Tensor]) -> Tensor:
        return parts[0].reshape(self.shape)

    def to_theirs(self, tensor: Tensor) -> tuple[Tensor, ...]:
        return (tensor.reshape(-1),)


@dataclass(frozen=True, slots=True, kw_only=True)
class QueryKeyValue:
    """Three projections in one, ordered by query group: that group's query heads, its key head, its value head.

    A tensor-parallel shard of ours is then a contiguous run of groups. ``tail`` is (E,) for weights, () for biases.
    """

    ours: str
    query: str
    key: str
    value: str
    groups: int
    heads_per_group: int
    head_dim: int
    tail: Shape

    @property
    def shape(self) -> Shape:
        return (self.groups * (self.heads_per_group + 2) * self.head_dim, *self.tail)

    @property
    def theirs(self) -> dict[str, Shape]:
        rows = self.groups * self.head_dim
        return {
            self.query: (rows * self.heads_per_group, *self.tail),
            self.key: (rows, *self.tail),
            self.value: (rows, *self.tail),
        }

    def to_ours(self, parts: Sequence[Tensor]) -> Tensor:
        by_group = [part.reshape(self.groups, -1, *self.tail) for part in parts]
        return torch.cat(by_group, dim=1).reshape(self.shape)

    def to_theirs(self, tensor: Tensor) -> tuple[Tensor, ...]:
        by_group = tensor.reshape(self.groups, -1, *self.tail)
        queries, keys = self.heads_per_group * self.head_dim, (self.heads_per_group + 1) * self.head_dim
        parts = (by_group[:, :queries], by_group[:, queries:keys], by_group[:, keys:])
        return tuple(part.reshape(-1, *self.tail) for part in parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class GateUp:
    """A gated MLP's two input projections [F, …] stacked to [2 F, …], the activated one (gate) first."""

    ours: str
    gate: str
    up: str
    each: Shape

    @property
    def shape(self) -> Shape:
        return (2 * self.each[0], *self.each[1:])

    @property
    def theirs(self) -> dict[str, Shape]:
        return {self.gate: self.each, self.up: self.each}

    def to_ours(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.cat(tuple(parts))

    def to_theirs(self, tensor: Tensor) -> tuple[Tensor, ...]:
        return tensor[: self.each[0]], tensor[self.each[0] :]


@dataclass(frozen=True, slots=True, kw_only=True)
class PaddedVocabulary:
    """A table [W, E] with zero rows appended up to ``padded_rows``; they are dropped on the way back."""

    ours: str
    name: str
    rows: int
    padded_rows: int
    width: int

    @property
    def shape(self) -> Shape:
        return (self.padded_rows, self.width)

    @property
    def theirs(self) -> dict[str, Shape]:
        return {self.name: (self.rows, self.width)}

    def to_ours(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.nn.functional.pad(parts[0], (0, 0, 0, self.padded_rows - self.rows))

    def to_theirs(self, tensor: Tensor) -> tuple[Tensor, ...]:
        return (tensor[: self.rows],)


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterTable:
    """All parameters of one model. Each name of either side occurs exactly once."""

    mappings: tuple[ParameterMapping, ...]
    repeats: Mapping[str, str] = field(default_factory=dict)
    """Names their folder may hold besides, which must equal another one of theirs bit for bit (a tied head)."""
    derived: re.Pattern[str] | None = None
    """Names their folder may hold besides and that follow from the configuration (old rotary frequencies)."""

    def __post_init__(self) -> None:
        for names in ([m.ours for m in self.mappings], [name for m in self.mappings for name in m.theirs]):
            assert len(names) == len(set(names)), f"a name occurs twice in the table: {sorted(names)}"

    def theirs(self) -> dict[str, Shape]:
        """Every name and shape a Hugging Face folder must hold, in the order :meth:`to_theirs` yields them."""
        return {name: shape for mapping in self.mappings for name, shape in mapping.theirs.items()}

    def ours(self) -> dict[str, Shape]:
        """Every name and shape a backbone must have, in the order :meth:`to_ours` yields them."""
        return {mapping.ours: mapping.shape for mapping in self.mappings}

    def check_theirs(self, found: Mapping[str, Shape], where: str) -> None:
        """ValueError that names every tensor of ``found`` that is missing, extra or of another shape."""
        expected = self.theirs()
        expected |= {name: expected[origin] for name, origin in self.repeats.items() if name in found}
        surplus = {name for name in found if self.derived is not None and self.derived.fullmatch(name)}
        _check(expected, {name: shape for name, shape in found.items() if name not in surplus}, where)

    def check_ours(self, found: Mapping[str, Shape], where: str) -> None:
        """The same for the names and shapes of a backbone."""
        _check(self.ours(), found, where)

    def to_ours(self, read: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
        """(our name, tensor) one after the other; ``read`` gives one of theirs and is called once for each name."""
        for mapping in self.mappings:
            yield mapping.ours, mapping.to_ours([read(name) for name in mapping.theirs])

    def to_theirs(self, read: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
        """(their name, tensor) one after the other; ``read`` gives one of ours and is called once for each name."""
        for mapping in self.mappings:
            yield from zip(mapping.theirs, mapping.to_theirs(read(mapping.ours)), strict=True)


def _check(expected: Mapping[str, Shape], found: Mapping[str, Shape], where: str) -> None:
    problems = [f"missing: {name} {list(shape)}" for name, shape in expected.items() if name not in found]
    problems += [f"not expected: {name} {list(shape)}" for name, shape in found.items() if name not in expected]
    problems += [
        f"{name} has shape {list(found[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != shape
    ]
    if not problems:
        return
    shown = "\n  ".join(problems[:_SHOWN])
    more = f"\n  … and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    raise ValueError(
        f"{where}: {len(problems)} tensor(s) do not fit the configuration:\n  {shown}{more}\n"
        "config and weights must belong to one model; check that the folder is complete"
    )
