"""Confidence intervals: against the normal approximation, paired, seeded, and none where there is no spread to see."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
from numpy.typing import NDArray

from megabyte_distill.evaluation.bootstrap import Bootstrap, Counts


def mean(counts: Counts) -> Mapping[str, NDArray[np.float64]]:
    return {"mean": counts["value"] / counts["one"]}


def of(values: NDArray[np.float64]) -> Counts:
    return {"value": values, "one": np.ones_like(values)}


def test_the_interval_of_a_mean_is_the_normal_one() -> None:
    values = np.random.default_rng(0).exponential(size=400)
    low, high = Bootstrap(resamples=4000).intervals(of(values), mean)["mean"]
    half = 1.96 * values.std() / np.sqrt(values.size)
    assert low == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.15 * half)


def test_it_covers_the_truth_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        low, high = Bootstrap(resamples=300, confidence=0.8).intervals(of(generator.normal(size=60)), mean)["mean"]
        covered += low <= 0 <= high
    assert 0.70 < covered / 200 < 0.88


def test_a_ratio_of_paired_sums_has_no_spread_where_the_documents_agree() -> None:
    """Documents differ tenfold, but each has the same ratio: resampling the two apart would spread it."""
    size = np.random.default_rng(2).uniform(10, 100, size=20)

    def ratio(counts: Counts) -> Mapping[str, NDArray[np.float64]]:
        return {"ratio": counts["teacher"] / counts["student"], "teacher": counts["teacher"] / 20}

    found = Bootstrap().intervals({"teacher": 2 * size, "student": 3 * size}, ratio)
    assert found["ratio"] == pytest.approx((2 / 3, 2 / 3))
    assert found["teacher"][1] > 1.1 * found["teacher"][0]


def test_large_sets_are_drawn_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(3).normal(size=50)
    whole = Bootstrap(resamples=90).intervals(of(values), mean)
    monkeypatch.setattr("megabyte_distill.evaluation.bootstrap._DRAWS_AT_ONCE", 50 * 40)
    assert Bootstrap(resamples=90).intervals(of(values), mean) == whole


def test_equal_seeds_give_equal_intervals_and_others_do_not() -> None:
    counts = of(np.random.default_rng(4).normal(size=30))
    assert Bootstrap(seed=5).intervals(counts, mean) == Bootstrap(seed=5).intervals(counts, mean)
    assert Bootstrap(seed=5).intervals(counts, mean) != Bootstrap(seed=6).intervals(counts, mean)


@pytest.mark.parametrize("bootstrap, documents", [(Bootstrap(), 1), (Bootstrap(resamples=0), 9)])
def test_none_without_draws_or_documents(bootstrap: Bootstrap, documents: int) -> None:
    assert bootstrap.intervals(of(np.arange(documents, dtype=float)), mean) == {}


def test_draws_that_leave_a_figure_undefined_do_not_count() -> None:
    counts = {"value": np.array([1.0, 0.0]), "one": np.array([1.0, 0.0]), "never": np.zeros(2)}

    def figures(sums: Counts) -> Mapping[str, NDArray[np.float64]]:
        with np.errstate(invalid="ignore"):
            return {"sometimes": sums["value"] / sums["one"], "never": sums["never"] / sums["never"]}

    assert Bootstrap(resamples=50).intervals(counts, figures) == {"sometimes": (1.0, 1.0)}


@pytest.mark.parametrize("field, value", [("resamples", -1), ("confidence", 1.0), ("confidence", 0.0), ("seed", -1)])
def test_settings_out_of_range_are_refused(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{field} is {value}"):
        Bootstrap(**{field: value})  # type: ignore[arg-type]
