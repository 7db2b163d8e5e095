"""Noise: seeded, at the rate asked for, nested over levels, and of the kind it is called."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megabyte_distill.evaluation.noise import LEVELS, Noise, add_noise

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
KINDS = st.sampled_from(list(Noise))
SHARES = st.floats(0, 1)
PROSE = "The old house stood on a hill, and Straße ĳssel naïve дом 房子 İstanbul. " * 30


def is_subsequence(part: str, whole: str) -> bool:
    rest = iter(whole)
    return all(character in rest for character in part)


@settings(deadline=None)
@given(TEXTS, KINDS, SHARES, st.integers(0, 99))
def test_equal_arguments_give_equal_texts(text: str, kind: Noise, level: float, seed: int) -> None:
    noised = add_noise(text, kind, level, seed=seed)
    assert noised == add_noise(text, kind, level, seed=seed)
    assert [c for c in noised if c.isspace()] == [c for c in text if c.isspace()]
    assert add_noise(text, kind, 0.0, seed=seed) == text


@settings(deadline=None)
@given(TEXTS, SHARES, st.integers(0, 99))
def test_each_kind_does_what_its_name_says(text: str, level: float, seed: int) -> None:
    case, repeat, drop, swap, typo = (add_noise(text, kind, level, seed=seed) for kind in Noise)
    assert all(a == b or a.swapcase() == b for a, b in zip(case, text, strict=True))
    assert is_subsequence(text, repeat) and set(repeat) == set(text)
    assert is_subsequence(drop, text)
    assert Counter(swap) == Counter(text)
    assert len(typo) == len(text) and all(
        a == b or (b.isalpha() and a.isalpha()) for a, b in zip(typo, text, strict=True)
    )


@pytest.mark.parametrize("kind", list(Noise))
def test_a_higher_level_touches_what_a_lower_one_does(kind: Noise) -> None:
    noised = [add_noise(PROSE, kind, level, seed=1) for level in LEVELS]
    if kind in (Noise.REPEAT, Noise.DROP):
        rates = [abs(len(text) - len(PROSE)) / len(PROSE.replace(" ", "")) for text in noised]
        assert rates == pytest.approx(LEVELS, rel=0.4)
    else:
        places = [{place for place, (a, b) in enumerate(zip(text, PROSE, strict=True)) if a != b} for text in noised]
        assert all(low < high for low, high in pairwise(places))
        assert len(places[-1]) > 0.2 * len(PROSE)


def test_other_seeds_touch_other_characters() -> None:
    assert add_noise(PROSE, Noise.DROP, 0.1, seed=1) != add_noise(PROSE, Noise.DROP, 0.1, seed=2)


def test_letters_whose_other_case_does_not_lead_back_stay() -> None:
    assert add_noise("ßıŉ", Noise.CASE, 1.0, seed=0) == "ßıŉ"
    assert add_noise("aÉд", Noise.CASE, 1.0, seed=0) == "AéД"


def test_a_typo_is_a_neighbour_on_the_keyboard() -> None:
    for seed in range(9):
        assert add_noise("q", Noise.TYPO, 1.0, seed=seed) == "w"
        assert add_noise("G", Noise.TYPO, 1.0, seed=seed) in "FH"
        assert set(add_noise("房子大", Noise.TYPO, 1.0, seed=seed)) <= set("房子大")


@pytest.mark.parametrize("level", [-0.1, 1.5])
def test_levels_that_are_no_shares_are_refused(level: float) -> None:
    with pytest.raises(ValueError, match=f"level is {level}"):
        add_noise("a", Noise.CASE, level, seed=0)
