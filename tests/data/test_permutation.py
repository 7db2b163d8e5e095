from __future__ import annotations

import pytest

from megabyte_distill.data.permutation import Permutation


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 17, 1000, 1024, 1025])
def test_every_value_comes_once(size: int) -> None:
    for key in range(20):
        permutation = Permutation(size, (key, 0))
        assert sorted(permutation[index] for index in range(size)) == list(range(size))


def test_keys_give_different_orders_and_one_key_always_the_same() -> None:
    orders = {tuple(Permutation(50, (seed, epoch))[i] for i in range(50)) for seed in range(10) for epoch in range(10)}
    assert len(orders) == 100
    assert [Permutation(50, (1, 2))[i] for i in range(8)] == [Permutation(50, (1, 2))[i] for i in range(8)]


def test_the_order_is_written_down() -> None:
    """A change of these numbers changes what a resumed run reads."""
    assert [Permutation(1000, (1234, 0, 0))[index] for index in range(6)] == [727, 328, 436, 845, 332, 501]


def test_small_orders_are_fair() -> None:
    counts: dict[tuple[int, ...], int] = {}
    for key in range(6000):
        permutation = Permutation(3, (key,))
        order = tuple(permutation[index] for index in range(3))
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 6 and min(counts.values()) > 500


def test_neighbours_are_scattered() -> None:
    permutation = Permutation(100_000, (7,))
    steps = [abs(permutation[index + 1] - permutation[index]) for index in range(2000)]
    assert 28_000 < sum(steps) / len(steps) < 39_000


def test_a_hundred_million_documents_need_no_index() -> None:
    permutation = Permutation(100_000_000, (7,))
    values = {permutation[index] for index in range(99_990_000, 100_000_000)}
    assert len(values) == 10_000 and max(values) < 100_000_000


def test_bounds() -> None:
    with pytest.raises(ValueError, match="0 documents"):
        Permutation(0, (1,))
    with pytest.raises(IndexError):
        Permutation(3, (1,))[3]
