"""Megatron's two small notations for data: a weighted blend of data sets and the split of their documents."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

DEFAULT_SPLIT = "969,30,1"


@dataclass(frozen=True, slots=True)
class BlendEntry:
    """One data set of a blend. ``weight`` is as given, not normalised; None counts the set by its bytes."""

    weight: float | None
    stem: str


def parse_blend(words: Sequence[str]) -> tuple[BlendEntry, ...]:
    """``stem1 stem2 …`` or ``w1 stem1 w2 stem2 …`` as entries; nothing gives nothing. ValueError for a mixture."""
    if not any(_reads_as_number(word) for word in words):
        return tuple(BlendEntry(None, word) for word in words)
    if len(words) % 2:
        raise ValueError(f"got {len(words)} words, expected stems only, or pairs: weight stem weight stem …")
    entries = []
    for word, stem in zip(words[::2], words[1::2], strict=True):
        weight = _number(word)
        if weight is None or weight <= 0 or _reads_as_number(stem):
            raise ValueError(f"got {word!r} where the weight of {stem!r} stands, expected a number above 0")
        entries.append(BlendEntry(weight, stem))
    return tuple(entries)


def read_blend_file(path: str) -> tuple[str, ...]:
    """The words of a blend from a text file, white space between them; a blend of hundreds of sets is no command line.

    ValueError where the file is missing, unreadable or empty, or holds flags.
    """
    expected = "expected a text file with the words of --data-path"
    try:
        words = tuple(Path(path).read_text(encoding="utf-8").split())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path!r} cannot be read ({error}); {expected}") from None
    if not words:
        raise ValueError(f"{path!r} is empty; {expected}")
    for word in words:
        if word.startswith("--"):
            raise ValueError(f"{path!r} holds the flag {word!r}; {expected} and nothing else")
    return words


def parse_split(text: str | None) -> tuple[float, float, float]:
    """Shares of documents (training, validation, test) that sum to 1, from ``969,30,1``; None gives the default."""
    words = (DEFAULT_SPLIT if text is None else text).split(",")
    shares = [_number(word) for word in words]
    numbers = [share for share in shares if share is not None and share >= 0]
    if len(numbers) != len(words) or len(words) > 3 or not sum(numbers) > 0:
        raise ValueError(f"got {text!r}, expected up to three numbers from 0 up, such as {DEFAULT_SPLIT}")
    numbers += [0.0] * (3 - len(numbers))
    total = sum(numbers)
    return numbers[0] / total, numbers[1] / total, numbers[2] / total


def _reads_as_number(word: str) -> bool:
    """True also for nan and inf: nobody's data set is called that."""
    try:
        float(word)
    except ValueError:
        return False
    return True


def _number(word: str) -> float | None:
    """The finite number a word stands for, or None."""
    try:
        value = float(word)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
