"""Selecting and putting back rows of a nested state."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megabyte_distill.model.row_state import RowState


@dataclass(frozen=True, slots=True)
class Inner(RowState):
    value: Tensor


@dataclass(frozen=True, slots=True)
class Outer(RowState):
    flag: Tensor
    parts: tuple[Inner, ...]
    own: Inner


def state(rows: int, fill: float) -> Outer:
    inner = [Inner(torch.full((rows, 2), fill)) for _ in range(3)]
    return Outer(torch.full((rows,), bool(fill)), (inner[0], inner[1]), inner[2])


def test_select_copies_and_put_writes_exactly_the_rows() -> None:
    whole, rows = state(4, 0.0), torch.tensor([3, 1])
    sub = whole.select(rows)
    sub.own.value.fill_(7.0)
    assert not whole.own.value.any()
    whole.put(rows, state(2, 1.0))
    assert whole.flag.tolist() == [False, True, False, True]
    for inner in (*whole.parts, whole.own):
        assert inner.value[:, 0].tolist() == [0.0, 1.0, 0.0, 1.0]


def test_rows_may_be_a_mask() -> None:
    whole, mask = state(3, 0.0), torch.tensor([True, False, True])
    assert whole.select(mask).flag.shape == (2,)
    whole.put(mask, state(2, 1.0))
    assert whole.own.value[:, 1].tolist() == [1.0, 0.0, 1.0]
