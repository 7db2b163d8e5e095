"""Text of any kind as HTML: escaped, what has no picture made visible, and a page with its boundaries coloured."""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Sequence

from megabyte_distill.evaluation.marked_text import MarkedText, split_characters

_JOINERS = "\u200c\u200d"
"""Zero-width, and part of how scripts and emoji are written: shown as they are, unless a boundary lies in front."""
_PLACEHOLDER = "◌"
"""Carries a combining character that a boundary parts from its base."""


def escaped(value: object) -> str:
    """``str(value)`` as HTML text; control characters and those that turn the writing around are shown by number."""
    return "".join(_character(character) for character in str(value))


def _character(character: str) -> str:
    if character in "\n\t" or character in _JOINERS or unicodedata.category(character)[0] != "C":
        return html.escape(character)
    return _by_name(f"U+{ord(character):04X}")


def _by_name(name: str) -> str:
    return f'<span class="code">{name}</span>'


def _behind_a_mark(character: str) -> str:
    """A character that must not join with what stands in front of the mark."""
    if character in _JOINERS:
        return _by_name(f"U+{ord(character):04X}")
    return (_PLACEHOLDER if unicodedata.category(character)[0] == "M" else "") + _character(character)


def page_html(page: Sequence[MarkedText]) -> str:
    """The texts, a paragraph each, with a mark behind each byte at which router or tokenizer end a chunk.

    A boundary inside a character is marked behind it. A text's last byte has no mark: that it ends is no prediction.
    """
    return "\n".join(f'<div class="text" dir="auto">{_marked_html(text)}</div>' for text in page)


def _marked_html(marked: MarkedText) -> str:
    parts = []
    is_behind_a_mark = False
    for start, stop, character in split_characters(marked.text):
        if character is None:
            parts.append(_by_name(f"{marked.text[start]:02X}"))
        elif character == "\n":
            parts.append(_by_name("↵"))
        else:
            parts.append(_behind_a_mark(character) if is_behind_a_mark else _character(character))
        marks = [
            _mark(learned=marked.learned[index], gold=marked.gold[index], left=stop - 1 - index)
            for index in range(start, min(stop, len(marked.text) - 1))
        ]
        parts += marks
        is_behind_a_mark = any(marks)
        if character == "\n":
            parts.append("\n")
            is_behind_a_mark = False
    return "".join(parts)


def _mark(*, learned: bool, gold: bool, left: int) -> str:
    if not (learned or gold):
        return ""
    kind = "both" if learned and gold else "learned" if learned else "gold"
    inside = f' title="inside the character, bytes left: {left}"' if left else ""
    return f'<i class="{kind}"{inside}></i>'


def counts(page: Sequence[MarkedText]) -> dict[str, int]:
    """How many boundaries are ``both``'s, ``learned`` alone and ``gold`` alone, as :func:`page_html` marks them."""
    pairs = [
        pair
        for marked in page
        for pair in zip(list(marked.learned)[:-1], list(marked.gold)[:-1], strict=True)
    ]  # fmt: skip
    return {
        "both": sum(learned and gold for learned, gold in pairs),
        "learned": sum(learned and not gold for learned, gold in pairs),
        "gold": sum(gold and not learned for learned, gold in pairs),
    }
