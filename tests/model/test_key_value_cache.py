"""Attention of positions to a cache equals that inside a whole row."""

from __future__ import annotations

import pytest
import torch

from megabyte_distill.model.key_value_cache import KeyValueCache, NewPositions, cached_attention
from megabyte_distill.model.packed_attention import packed_attention


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("heads", [2, 6])
@pytest.mark.parametrize("order", [[2, 0], [0, 1, 2]])
def test_several_new_positions_of_a_row_see_it_and_each_other(window: int | None, heads: int, order: list[int]) -> None:
    torch.manual_seed(0)
    before, more = [4, 1, 7], {2: 5, 0: 2, 1: 1}
    texts = [tuple(torch.randn(count + more[row], n, 8) for n in (heads, 2, 2)) for row, count in enumerate(before)]
    cache = KeyValueCache.empty(3, torch.device("cpu"))
    for place in range(max(before)):
        rows = torch.tensor([row for row in range(3) if before[row] > place])
        q, k, v = (torch.stack([texts[row][part][place] for row in rows.tolist()]) for part in range(3))
        cached_attention(q, k, v, cache=cache, layer=1, new=NewPositions.of(cache, rows), window=window)
        cache.lengths[rows] += 1
    which = [(row, offset) for row in order for offset in range(more[row])]
    rows, offsets = torch.tensor([row for row, _ in which]), torch.tensor([offset for _, offset in which])
    q, k, v = (torch.stack([texts[row][part][before[row] + at] for row, at in which]) for part in range(3))
    new = NewPositions.of(cache, rows, offsets)
    found = cached_attention(q, k, v, cache=cache, layer=1, new=new, window=window)
    for (row, offset), own in zip(which, found, strict=True):
        expected = packed_attention(*texts[row], [texts[row][0].shape[0]], window)[before[row] + offset]
        torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-5)
