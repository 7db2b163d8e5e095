"""Text with its chunks shown, character by character as they are complete."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator

BAR, INNER_BAR = "|", "¦"
"""Behind the last byte of a chunk; behind a character inside which one ended."""
_SHADES = ("\x1b[48;5;236m", "\x1b[48;5;24m")
_PLAIN = "\x1b[0m"


def marked_characters(pairs: Iterable[tuple[int, bool]], *, colour: bool) -> Iterator[str]:
    """The characters of (byte, bit) pairs, each as soon as it is complete, chunks in changing colours or ended by bars.

    Bytes that are no UTF-8 become U+FFFD.
    """
    number = 0
    for text, bar in _with_bars(pairs):
        yield f"{_SHADES[number % 2]}{text}{_PLAIN}" if colour else f"{text}{bar}"
        number += bool(bar)


def mark_chunks(text: bytes, bits: Iterable[bool], *, colour: bool) -> str:
    """Text [L bytes] with bits [L] marked: see :func:`marked_characters`."""
    return "".join(marked_characters(zip(text, bits, strict=True), colour=colour))


def _with_bars(pairs: Iterable[tuple[int, bool]]) -> Iterator[tuple[str, str]]:
    """(characters, the bar behind them or "")."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    ended_inside = False
    for byte, bit in pairs:
        text = decoder.decode(bytes([byte]))
        if decoder.getstate()[0]:  # the byte begins or goes on with a character; text is what it broke off
            if text:
                yield text, BAR if ended_inside else ""
                ended_inside = False
            ended_inside |= bit
            continue
        if text[:-1]:  # broken off by this byte, which is a character of its own
            yield text[:-1], BAR if ended_inside else ""
            ended_inside = False
        yield text[-1], BAR if bit else INNER_BAR if ended_inside else ""
        ended_inside = False
    rest = decoder.decode(b"", final=True)
    if rest:
        yield rest, BAR if ended_inside else ""
