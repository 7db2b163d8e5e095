"""Noise on characters: what a reader hardly minds and a tokenizer does."""

from __future__ import annotations

import random
from collections.abc import Callable
from enum import StrEnum

LEVELS = (0.02, 0.05, 0.1, 0.2, 0.4)
"""Share of characters that are touched."""
_KEYBOARD = ("qwertyuiop", "asdfghjkl", "zxcvbnm")


class Noise(StrEnum):
    """What happens to a character."""

    CASE = "case"
    """A letter that has two cases changes its case."""
    REPEAT = "repeat"
    """It stands twice."""
    DROP = "drop"
    """It is missing."""
    SWAP = "swap"
    """It changes places with the next one."""
    TYPO = "typo"
    """A letter is replaced: a Latin one by a neighbour on the keyboard, any other by a letter of the same text."""


def add_noise(text: str, kind: Noise, level: float, *, seed: int) -> str:
    """``text`` with about ``level`` of its characters touched; white space is neither typed wrongly nor lost.

    Equal arguments give equal texts, and a lower level touches part of what a higher one does. ValueError for a level
    outside 0 to 1.
    """
    if not 0 <= level <= 1:
        raise ValueError(f"level is {level}; expected a share of characters from 0 to 1")
    # a text as seed is hashed the same way in every process
    generator = random.Random(f"{seed} {kind.value} {text}")
    draws = [(generator.random(), generator.random()) for _ in text]
    touched = [draw < level and not character.isspace() for character, (draw, _) in zip(text, draws, strict=True)]
    return _CHANGES[kind](text, touched, [choice for _, choice in draws])


def _case(text: str, touched: list[bool], _: list[float]) -> str:
    return "".join(_other_case(c) if hit else c for c, hit in zip(text, touched, strict=True))


def _other_case(character: str) -> str:
    """Itself where the other case is several characters or does not lead back, as of ß and ı."""
    other = character.swapcase()
    return other if len(other) == 1 and other.swapcase() == character else character


def _repeat(text: str, touched: list[bool], _: list[float]) -> str:
    return "".join(c * 2 if hit else c for c, hit in zip(text, touched, strict=True))


def _drop(text: str, touched: list[bool], _: list[float]) -> str:
    return "".join(c for c, hit in zip(text, touched, strict=True) if not hit)


def _swap(text: str, touched: list[bool], _: list[float]) -> str:
    characters = list(text)
    for place in range(len(characters) - 1):
        # by pairs, so that no character wanders on
        if touched[place] and place % 2 == 0 and not characters[place + 1].isspace():
            characters[place], characters[place + 1] = characters[place + 1], characters[place]
    return "".join(characters)


def _typo(text: str, touched: list[bool], choices: list[float]) -> str:
    letters = sorted({character for character in text if character.isalpha()})
    return "".join(
        _mistyped(c, letters, choice) if hit and c.isalpha() else c
        for c, hit, choice in zip(text, touched, choices, strict=True)
    )


def _mistyped(character: str, letters: list[str], choice: float) -> str:
    candidates = _neighbours(character) or [letter for letter in letters if letter != character]
    return candidates[int(choice * len(candidates))] if candidates else character


def _neighbours(character: str) -> list[str]:
    """Letters beside a Latin one on the keyboard, in its case."""
    for row in _KEYBOARD:
        place = row.find(character.lower())
        if place >= 0:
            found = [row[near] for near in (place - 1, place + 1) if 0 <= near < len(row)]
            return [letter.upper() if character.isupper() else letter for letter in found]
    return []


_CHANGES: dict[Noise, Callable[[str, list[bool], list[float]], str]] = {
    Noise.CASE: _case,
    Noise.REPEAT: _repeat,
    Noise.DROP: _drop,
    Noise.SWAP: _swap,
    Noise.TYPO: _typo,
}
