"""Megatron's notations for blends and splits."""

from __future__ import annotations

from pathlib import Path

import pytest

from megabyte_distill.config.blend import BlendEntry, parse_blend, parse_split, read_blend_file


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


def test_a_file_gives_the_words_between_its_white_space(tmp_path: Path) -> None:
    path = tmp_path / "blend.txt"
    path.write_text("0.3 first_text_document\n\t0.7\r\n  日本_text_document  \n", encoding="utf-8")
    words = read_blend_file(str(path))
    assert words == ("0.3", "first_text_document", "0.7", "日本_text_document")
    assert parse_blend(words) == (BlendEntry(0.3, "first_text_document"), BlendEntry(0.7, "日本_text_document"))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "cannot be read"),
        (b"", "is empty"),
        (b" \n\t\n", "is empty"),
        (b"\xff\xfe\x00", "cannot be read"),
        (b"a_document --split 1", "holds the flag '--split'"),
        (b"--data-path a_document", "holds the flag '--data-path'"),
    ],
)
def test_a_file_without_a_blend_is_refused_by_name(tmp_path: Path, content: bytes | None, reason: str) -> None:
    path = tmp_path / "blend.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        read_blend_file(str(path))
    assert all(part in str(caught.value) for part in (str(path), reason, "expected a text file with the words of"))


def test_a_folder_and_an_impossible_name_are_no_file(tmp_path: Path) -> None:
    for name in (str(tmp_path), "", "nul\0"):
        with pytest.raises(ValueError, match="cannot be read"):
            read_blend_file(name)


def test_a_split_sums_to_one_and_missing_parts_are_zero() -> None:
    assert parse_split("8,1,1") == (0.8, 0.1, 0.1)
    assert parse_split("3,1") == (0.75, 0.25, 0.0)
    assert parse_split("1") == (1.0, 0.0, 0.0)
    assert parse_split(None) == (0.969, 0.03, 0.001)


@pytest.mark.parametrize("text", ["", "a,b", "1,2,3,4", "-1,2", "0,0", "nan,1"])
def test_a_wrong_split_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected up to three numbers"):
        parse_split(text)
