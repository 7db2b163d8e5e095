"""How far to draft, and what from."""

from __future__ import annotations

import pytest
import torch

from megabyte_distill.inference.speculation import CHOICES, FixedLength, MeasuredLength
from megabyte_distill.inference.state_guess import StateGuess, following


def seconds_spent(length: MeasuredLength, cost: dict[int, float], new_bytes: int, hiccups: float = 0.0) -> float:
    """Of writing so many bytes, four a backbone pass, where a byte costs what ``cost`` says of the length in force.

    In a share of the steps the clock shows twenty times as much.
    """
    spent, random = 0.0, torch.Generator().manual_seed(0)
    for _ in range(new_bytes // 4):
        seconds = 4 * cost[length.now]
        is_hiccup = float(torch.rand((), generator=random)) < hiccups
        length.observe(4, 1.0, 20 * seconds if is_hiccup else seconds)
        spent += seconds
    return spent


@pytest.mark.parametrize("hiccups", [0.0, 0.03])
@pytest.mark.parametrize("new_bytes", [256, 1024, 20_000])
def test_trying_drafts_that_never_help_costs_little(new_bytes: int, hiccups: float) -> None:
    cost = {choice: 1.0 + 0.2 * choice for choice in CHOICES}
    # a bad window is over before it is known to be bad
    allowed = 0.05 * new_bytes + 16 * max(cost.values())
    assert seconds_spent(MeasuredLength(), cost, new_bytes, hiccups) <= new_bytes + allowed


def test_the_fastest_length_is_found_and_kept() -> None:
    cost = {0: 1.0, 2: 0.9, 4: 0.7, 8: 0.6, 16: 0.8}
    length = MeasuredLength()
    seconds_spent(length, cost, 4000)
    assert seconds_spent(length, cost, 4000) < 1.1 * 0.6 * 4000
    cost[8] = 2.0  # the text has changed
    seconds_spent(length, cost, 4000)
    assert seconds_spent(length, cost, 4000) < 1.1 * 0.7 * 4000


def test_a_fixed_length_stays() -> None:
    length = FixedLength(3)
    length.observe(10, 1.0, 5.0)
    assert length.now == length.longest == 3


def test_a_linear_relation_is_learned_and_unknown_it_is_the_state_before() -> None:
    torch.manual_seed(0)
    guess, width = StateGuess(6, torch.device("cpu")), 6
    a, b, c = torch.randn(width, width), torch.randn(width, width), torch.randn(width)
    chunks, before = torch.randn(400, width), torch.randn(400, width)
    hidden = chunks @ a + before @ b + c
    assert torch.equal(guess(chunks, before), before)
    for part in torch.arange(400).split(40):
        guess.learn(chunks[part], before[part], hidden[part])
    assert guess.seen == 400
    error = (guess(chunks, before) - hidden).square().mean() / hidden.square().mean()
    assert float(error) < 1e-3


def test_what_stands_before_a_chunk_is_its_own_rows() -> None:
    hidden, before = torch.arange(5.0)[:, None], torch.tensor([[10.0], [20.0], [30.0]])
    row = torch.tensor([0, 0, 2, 2, 2])
    assert following(row, hidden, before)[:, 0].tolist() == [10.0, 0.0, 30.0, 2.0, 3.0]
