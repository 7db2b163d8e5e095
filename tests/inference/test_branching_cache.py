"""Rows that branch hold what plain copies of them hold."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from megabyte_distill.inference.branching_cache import BranchingCache
from megabyte_distill.model.key_value_cache import KeyValueCache, NewPositions

LAYERS = (1, 2)


def written(caches: list[KeyValueCache], rows: Tensor) -> list[list[tuple[Tensor, Tensor]]]:
    """One more random position of ``rows`` in each cache; what they return, up to each row's length."""
    new = [(torch.randn(rows.shape[0], 2, 3), torch.randn(rows.shape[0], 2, 3)) for _ in LAYERS]
    returned = []
    for cache in caches:
        found, places = [], NewPositions.of(cache, rows)
        for layer, (keys, values) in zip(LAYERS, new, strict=True):
            stored = cache.append(layer, places, keys, values)
            for place, row in enumerate(rows.tolist()):
                found.append(tuple(kept[place, : int(cache.lengths[row]) + 1] for kept in stored))
        cache.lengths[rows] += 1
        returned.append(found)
    return returned


@pytest.mark.parametrize("seed", range(4))
def test_rows_that_branch_are_copies(seed: int) -> None:
    choose = random.Random(seed)
    plain = KeyValueCache.empty(2, torch.device("cpu"))
    written([plain], torch.arange(2))
    every = torch.tensor([0, 0, 1, 1, 1])
    branching, copies = BranchingCache.of(plain, every), plain.select(every)
    for _ in range(150):
        count = copies.lengths.shape[0]
        shuffled = choose.sample(range(count), count)
        match choose.choice(["write", "write", "write", "branch", "keep", "put"]):
            case "branch":
                source, target = torch.tensor(shuffled[:2]), torch.tensor(shuffled[2:4])
                branching.branch(source, target)
                copies.put(target, copies.select(source))
            case "keep":
                rows = torch.tensor(choose.choices(shuffled, k=5))
                branching.keep(rows)
                copies = copies.select(rows)
            case "put":
                rows = torch.tensor(shuffled[:2])
                branching.put(rows, plain)
                copies.put(rows, plain)
            case _:
                rows = torch.tensor(sorted(shuffled[: choose.randrange(1, count + 1)]))
                ours, theirs = written([branching, copies], rows)
                for mine, other in zip(ours, theirs, strict=True):
                    assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))
        assert torch.equal(branching.lengths, copies.lengths)
    settled = branching.plain(torch.tensor([3, 1]))
    for ours, theirs in zip(
        written([settled], torch.arange(2))[0],
        written([copies.select(torch.tensor([3, 1]))], torch.arange(2))[0],
        strict=True,
    ):
        assert all(torch.equal(a[:-1], b[:-1]) for a, b in zip(ours, theirs, strict=True))


def test_what_no_row_holds_any_more_is_given_up() -> None:
    """Two rows that keep branching from each other need room for two, however long that goes on."""
    plain = KeyValueCache.empty(2, torch.device("cpu"))
    written([plain], torch.arange(2))
    cache = BranchingCache.of(plain, torch.arange(2))
    for step in range(600):
        cache.branch(torch.tensor([step % 2]), torch.tensor([1 - step % 2]))
        written([cache], torch.arange(2))
    size = cache.keys[LAYERS[0]].shape[0]
    # the common part once, and up to as much again that is free
    assert int(cache.lengths.max()) == 601 and size < 3 * 601 + 64
