"""Tasks on the characters of words: spelling, reversing, counting, replacing; the words come from a text itself."""

from __future__ import annotations

import hashlib
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

_WORD = re.compile(r"(?<!\w)[^\W\d_]{4,8}(?!\w)")
_ALPHABET = "abcdefghijklmnopqrstuvwxyz"
CHOICES = 4
"""The right answer among so many."""


class CharacterTask(StrEnum):
    """What is to be done with a word."""

    SPELL = "spell"
    REVERSE = "reverse"
    COUNT = "count"
    REPLACE = "replace"


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A few-shot prompt and what may follow."""

    prompt: str
    answers: tuple[str, ...]
    """The right one first, each with its newline; all different."""


def find_words(text: str, *, at_most: int = 2000) -> list[str]:
    """Words of four to eight letters in small letters, the most frequent ones, in an order that a hash decides."""
    # ½ and ² are no digits for the pattern, and no letters either
    counts = Counter(word for word in _WORD.findall(text.lower()) if word.isalpha())
    frequent = sorted(counts, key=lambda word: (-counts[word], word))[:at_most]
    return sorted(frequent, key=lambda word: hashlib.blake2b(word.encode()).digest())


def make_questions(task: CharacterTask, words: Sequence[str], *, count: int, shots: int, seed: int) -> list[Question]:
    """At most ``count`` questions on words that no example shows.

    ``words`` (:func:`find_words`): the first ones become the ``shots`` examples, the next ones questions; fewer where
    there are too few words. ``seed`` draws letters and wrong answers.
    """
    generator = random.Random(f"{seed} {task.value}")
    examples = [_pose(task, word, generator) for word in words[:shots]]
    shown = "".join(f"{asked}{answer}" for asked, answer in examples)
    questions = []
    for word in words[shots : shots + count]:
        asked, answer = _pose(task, word, generator)
        wrong: dict[str, None] = {}
        for candidate in _wrong(task, answer, generator):
            if candidate != answer:
                wrong[candidate] = None
            if len(wrong) == CHOICES - 1:
                break
        questions.append(Question(prompt=shown + asked, answers=(answer, *wrong)))
    return questions


def _pose(task: CharacterTask, word: str, generator: random.Random) -> tuple[str, str]:
    """(question, answer) of a word."""
    if task is CharacterTask.SPELL:
        return f"The letters of {word}:", f" {' '.join(word)}\n"
    if task is CharacterTask.REVERSE:
        return f"{word} backwards:", f" {word[::-1]}\n"
    if task is CharacterTask.COUNT:
        return f"How many letters has {word}:", f" {len(word)}\n"
    old = generator.choice(word)
    new = generator.choice([letter for letter in _ALPHABET if letter not in word])
    return f"{word} with {new} for {old}:", f" {word.replace(old, new)}\n"


def _wrong(task: CharacterTask, answer: str, generator: random.Random) -> Iterator[str]:
    """Answers that look right, without end: two letters exchanged or one replaced, or another number."""
    if task is CharacterTask.COUNT:
        numbers = [number for number in range(3, 10) if number != int(answer)]
        generator.shuffle(numbers)
        yield from (f" {number}\n" for number in numbers)
        return
    places = [place for place, character in enumerate(answer) if character.isalpha()]
    changes: tuple[Callable[[list[str], int, int], None], ...] = (_exchange, lambda c, a, _: _replace(c, a, generator))
    while True:
        changed = list(answer)
        first, second = generator.sample(places, 2)
        generator.choice(changes)(changed, first, second)
        yield "".join(changed)


def _exchange(characters: list[str], first: int, second: int) -> None:
    characters[first], characters[second] = characters[second], characters[first]


def _replace(characters: list[str], place: int, generator: random.Random) -> None:
    characters[place] = generator.choice(_ALPHABET)
