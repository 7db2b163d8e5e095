"""What a part remembers between steps: dataclasses of tensors whose first axis is the row of a batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any, Self

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
