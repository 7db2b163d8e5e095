"""Chunks in a terminal: bars and colours, characters whole."""

from __future__ import annotations

import pytest

from megabyte_distill.inference.chunk_marks import mark_chunks, marked_characters


@pytest.mark.parametrize(
    ("text", "ends", "shown"),
    [
        (b"the cat", {2, 6}, "the| cat|"),
        (b"the c", {2}, "the| c"),
        (b"", set(), ""),
        ("é!".encode(), {1, 2}, "é|!|"),
        ("日本".encode(), {0, 5}, "日¦本|"),  # the first chunk ends inside a character
        ("日".encode(), {0, 2}, "日|"),
        (b"\xe6\x97a", {1, 2}, "\N{REPLACEMENT CHARACTER}|a|"),  # broken off
        (b"\xe6\xc3\xa9", {0}, "\N{REPLACEMENT CHARACTER}|é"),
        (b"a\xe6", {1}, "a\N{REPLACEMENT CHARACTER}|"),
        (b"\x97b", {0}, "\N{REPLACEMENT CHARACTER}|b"),
        (b"\xf0\x9f\x98\x97\x97", {4}, "😗\N{REPLACEMENT CHARACTER}|"),
    ],
)
def test_chunks_end_in_bars_and_characters_stay_whole(text: bytes, ends: set[int], shown: str) -> None:
    bits = [place in ends for place in range(len(text))]
    assert mark_chunks(text, bits, colour=False) == shown


def test_chunks_change_colours() -> None:
    pieces = list(marked_characters(zip("aé日!".encode(), [1, 0, 1, 1, 0, 0, 0], strict=True), colour=True))
    shades = [piece.split("m")[0] for piece in pieces]
    assert [piece[len(shade) + 1 :] for piece, shade in zip(pieces, shades, strict=True)] == [
        "a\x1b[0m", "é\x1b[0m", "日\x1b[0m", "!\x1b[0m",
    ]  # fmt: skip
    assert shades[0] == shades[2] == shades[0] and shades[1] == shades[3] != shades[0]
