"""Megatron's notations for blends and splits."""

from __future__ import annotations

import pytest

from megabyte_distill.config.blend import BlendEntry, parse_blend, parse_split


def test_stems_without_weights_and_none_is_no_blend() -> None:
    assert parse_blend(["a"]) == (BlendEntry(None, "a"),)
    assert parse_blend(["a", "b"]) == (BlendEntry(None, "a"), BlendEntry(None, "b"))
    assert parse_blend([]) == ()


def test_extreme_weights_are_kept() -> None:
    assert parse_blend(["1e-6", "a", "1", "b"]) == (BlendEntry(1e-6, "a"), BlendEntry(1.0, "b"))


@pytest.mark.parametrize(
    "words",
    [
        ["1"],
        ["1", "a", "b"],
        ["a", "1"],
        ["1", "a", "2"],
        ["1", "2"],
        ["0", "a"],
        ["-1", "b"],
        ["nan", "b"],
        ["inf", "b"],
    ],
)
def test_a_wrong_blend_is_refused(words: list[str]) -> None:
    with pytest.raises(ValueError, match="expected"):
        parse_blend(words)


def test_a_split_sums_to_one_and_missing_parts_are_zero() -> None:
    assert parse_split("8,1,1") == (0.8, 0.1, 0.1)
    assert parse_split("3,1") == (0.75, 0.25, 0.0)
    assert parse_split("1") == (1.0, 0.0, 0.0)
    assert parse_split(None) == (0.969, 0.03, 0.001)


@pytest.mark.parametrize("text", ["", "a,b", "1,2,3,4", "-1,2", "0,0", "nan,1"])
def test_a_wrong_split_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected up to three numbers"):
        parse_split(text)
