"""Ranges of settings: the same numbers and words for the Python API, an export's config.json and the flags."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from megabyte_distill.config.ranges import (
    BOUNDARY_THRESHOLD,
    COUNT,
    MIN_P,
    SEED,
    SIZE,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    Range,
)
from megabyte_distill.hf.configuration_megabyte import MegabyteConfig
from megabyte_distill.inference.sampling import Sampling


@pytest.mark.parametrize(
    ("allowed", "inside", "outside", "words"),
    [
        (TOP_P, (1, 1e-9), (0, 1.01, -1), "a number above 0 and at most 1 (1 keeps all)"),
        (MIN_P, (0, 1), (-0.1, 1.1), "a number of at least 0 and at most 1 (0 keeps all)"),
        (BOUNDARY_THRESHOLD, (0.5,), (0, 1), "a number above 0 and below 1"),
        (TEMPERATURE, (0, 9.5), (-1e-9,), "a number of at least 0 (0 is greedy)"),
        (COUNT, (1, 7), (0, 1.5, -1), "a whole number of at least 1"),
        (SIZE, (0,), (-1, 0.5), "a whole number of at least 0"),
        (TOP_K, (0, 600), (-1, 2.5), "a whole number of at least 0 (0 keeps all)"),
        (SEED, (0, 2**62 - 1), (-1, 2**62), f"a whole number of at least 0 and below {2**62}"),
    ],
)
def test_what_is_inside_and_what_is_said_of_the_rest(
    allowed: Range, inside: tuple[float, ...], outside: tuple[float, ...], words: str
) -> None:
    for value in inside:
        allowed.require("x", value)
        assert allowed.read(str(value)) == value
    for value in (*outside, float("nan"), float("inf")):
        with pytest.raises(ValueError) as refused:
            allowed.require("x", value)
        assert str(refused.value) == f"x is {value}; expected {words}"
    for text in (*map(str, outside), "nan", "", "x"):
        with pytest.raises(ValueError, match=r"^got ") as refused:
            allowed.read(text)
        assert text in str(refused.value) and str(refused.value).endswith(f", expected {words}")


def test_a_list_is_read_in_order_each_once() -> None:
    assert BOUNDARY_THRESHOLD.read_several("0.7,0.3,0.3") == (0.3, 0.7)
    for text, got in (("0.3,x", "'x'"), ("0.5,1", "1"), ("nan", "nan"), ("", "''"), ("0.1,", "''")):
        with pytest.raises(ValueError, match=f"^got {got}, expected a number above 0 and below 1"):
            BOUNDARY_THRESHOLD.read_several(text)


@pytest.mark.parametrize("make", [Sampling, MegabyteConfig])
@pytest.mark.parametrize("threshold", [0.0, 1.0, float("nan")])
def test_a_boundary_threshold_has_one_range_everywhere(make: Callable[..., object], threshold: float) -> None:
    with pytest.raises(ValueError, match=f"^boundary_threshold is {threshold}; expected {BOUNDARY_THRESHOLD.words}$"):
        make(boundary_threshold=threshold)


def test_a_number_beyond_all_numbers_is_refused_like_others() -> None:
    with pytest.raises(ValueError, match="expected a whole number"):
        SEED.read("1" + "0" * 400)
