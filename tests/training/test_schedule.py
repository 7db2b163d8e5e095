"""The learning rate over the updates of a stage."""

from __future__ import annotations

import math

import pytest

from megabyte_distill.config.stage import LrDecayStyle, StageConfig
from megabyte_distill.training.schedule import learning_rate_factor
from tests.pretrain.job import Job, metrics


def factors(config: StageConfig) -> list[float]:
    return [learning_rate_factor(config, iteration) for iteration in range(config.train_iters)]


def test_warm_up_rises_in_equal_steps_and_its_first_update_is_above_zero() -> None:
    rates = factors(StageConfig(train_iters=50, lr_warmup_iters=9))
    assert rates[:9] == pytest.approx([(i + 1) / 10 for i in range(9)])
    assert rates[9] == pytest.approx(1.0)
    assert max(rates) == rates[9]


@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_the_cosine_ends_on_the_floor(floor: float) -> None:
    rates = factors(StageConfig(train_iters=101, min_lr_ratio=floor))
    assert rates[0] == 1.0
    assert rates[-1] == pytest.approx(floor)
    assert rates[50] == pytest.approx(floor + (1 - floor) * 0.5)
    assert rates[25] == pytest.approx(floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi / 4)))
    assert rates == sorted(rates, reverse=True)


def test_min_lr_is_a_share_of_lr() -> None:
    rates = factors(StageConfig(train_iters=11, lr=2e-3, min_lr=5e-4, lr_decay_style=LrDecayStyle.LINEAR))
    assert rates[-1] == pytest.approx(0.25)
    assert rates[5] == pytest.approx(0.625)


def test_constant_stays_at_the_top() -> None:
    assert set(factors(StageConfig(train_iters=9, lr_decay_style=LrDecayStyle.CONSTANT))) == {1.0}


@pytest.mark.parametrize(("updates", "warm_up"), [(1, 0), (1, 1), (2, 2), (5, 4), (5, 5)])
def test_stages_of_few_updates_have_a_rate_for_each(updates: int, warm_up: int) -> None:
    rates = factors(StageConfig(train_iters=updates, lr_warmup_iters=warm_up))
    assert len(rates) == updates
    assert all(0 <= rate <= 1 for rate in rates)


def test_the_schedule_moves_once_an_update_whatever_the_micro_batches(job: Job, tmp_path) -> None:  # type: ignore[no-untyped-def]
    flags = (
        "--stages",
        "1a",
        "--1a.lr",
        "1e-3",
        "--lr-warmup-iters",
        "1",
        "--min-lr-ratio",
        "0.1",
        "--eval-iters",
        "0",
    )
    rates = []
    for name, size in (("two", "2"), ("one", "1")):
        assert job.run(tmp_path / name, *flags, "--micro-batch-size", size) == 0
        seen = metrics(tmp_path / name)
        rates.append([seen["1a", iteration, "learning rate"] for iteration in (1, 2, 3, 4)])
    assert rates[0] == rates[1]
    assert rates[0] == pytest.approx([0.5e-3, 1e-3, 0.55e-3, 0.1e-3])
