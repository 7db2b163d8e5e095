"""What a part remembers between steps: dataclasses of tensors whose first axis is the row of a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, Protocol, Self, TypeVar

import torch
from torch import Tensor


class RowState:
    """Base of every step state: its fields are tensors [R, ..], other states, or tuples of states.

    A ragged batch selects the rows that go on, steps them, and puts them back.
    """

    def select(self, rows: Tensor) -> Self:
        """A copy of the rows given by index (int64) or mask (bool); shares no memory with this state."""
        index = _as_index(rows)
        return self._rebuild(lambda value: value.index_select(0, index))

    def put(self, rows: Tensor, sub: Self) -> None:
        """Overwrites the given rows, in place, with those of ``sub`` in order."""
        index = _as_index(rows)
        for name in self._names():
            _put(getattr(self, name), index, getattr(sub, name))

    def _rebuild(self, change: Callable[[Tensor], Tensor]) -> Self:
        return type(self)(**{name: _map(getattr(self, name), change) for name in self._names()})

    def _names(self) -> list[str]:
        return [entry.name for entry in fields(self)]  # type: ignore[arg-type]


StateT = TypeVar("StateT", bound=RowState)
StateT_co = TypeVar("StateT_co", covariant=True)


class Span(Protocol[StateT_co]):
    """T bytes that each of R rows has read at once, of which it may turn out to keep only the first."""

    def after(self, counts: Tensor) -> StateT_co:
        """The state behind the first ``counts`` [R] int64 of them, 0 to T."""


def window_after(window: Tensor, kept: int, counts: Tensor) -> Tensor:
    """The last ``kept`` inputs [R, kept, C] once ``counts`` [R] new ones were read.

    window [R, kept + T, C]: those remembered before, then T new ones.
    """
    places = counts[:, None, None] + torch.arange(kept, device=window.device)[:, None]
    return window.gather(1, places.expand(-1, -1, window.shape[2]))


def after_each(states: Sequence[StateT], counts: Tensor) -> StateT:
    """Each row's state behind ``counts`` [R] of T bytes, ``states`` being all T + 1 in front of, between and behind
    them."""
    row = torch.arange(counts.shape[0], device=counts.device)
    first = states[0]
    return type(first)(
        **{name: torch.stack([getattr(state, name) for state in states])[counts, row] for name in first._names()}
    )


def _as_index(rows: Tensor) -> Tensor:
    return rows.nonzero()[:, 0] if rows.dtype is torch.bool else rows


def _map(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, RowState):
        return value._rebuild(change)
    return tuple(_map(item, change) for item in value)


def _put(target: Any, index: Tensor, source: Any) -> None:
    if isinstance(target, Tensor):
        target.index_copy_(0, index, source.to(target.dtype))
    elif isinstance(target, RowState):
        target.put(index, source)
    else:
        for own, other in zip(target, source, strict=True):
            _put(own, index, other)
