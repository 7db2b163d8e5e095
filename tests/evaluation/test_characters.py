"""Tasks on characters: right answers are right, wrong ones wrong, and no question's word is in an example."""

from __future__ import annotations

import pytest

from megabyte_distill.evaluation.characters import CHOICES, CharacterTask, find_words, make_questions
from megabyte_distill.evaluation.scripts import SCRIPT_PROMPTS, invalid_bytes, is_valid_utf8

TEXT = (
    "The quick brown foxes jumped over lazy sleeping hounds; aaaa Straße ДОМИК 12345 under_score understandingly " * 2
    + "once"
)


def solve(task: CharacterTask, asked: str) -> str:
    """By reading the question, not the code."""
    words = asked.replace(":", "").split()
    if task is CharacterTask.SPELL:
        return " ".join(words[-1])
    if task is CharacterTask.REVERSE:
        return "".join(reversed(words[0]))
    if task is CharacterTask.COUNT:
        return str(len(words[-1]))
    return "".join(words[2] if letter == words[4] else letter for letter in words[0])


def test_words_are_letters_of_a_text_in_an_order_of_their_own() -> None:
    words = find_words(TEXT)
    assert set(words) == {
        "quick", "brown", "foxes", "jumped", "over", "lazy", "sleeping", "hounds", "aaaa", "straße", "домик", "once",
    }  # fmt: skip
    assert words == find_words(TEXT) and words != sorted(words)
    assert "once" not in find_words(TEXT, at_most=11)


@pytest.mark.parametrize("task", list(CharacterTask))
def test_questions_have_one_right_answer_and_words_of_their_own(task: CharacterTask) -> None:
    words = find_words(TEXT)
    questions = make_questions(task, words, count=6, shots=3, seed=1)
    assert questions == make_questions(task, words, count=6, shots=3, seed=1) and len(questions) == 6
    for question in questions:
        *examples, asked = question.prompt.split("\n")
        assert len(examples) == 3
        for example in examples:
            text, _, answer = example.partition(":")
            assert answer.strip() == solve(task, text)
        right, *wrong = question.answers
        assert right == f" {solve(task, asked)}\n"
        assert len({right, *wrong}) == CHOICES and all(answer.endswith("\n") for answer in wrong)
        held_out = next(word for word in words if word in asked.replace(":", "").split())
        assert not any(held_out in example.replace(":", "").split() for example in examples)


def test_too_few_words_give_fewer_questions() -> None:
    assert len(make_questions(CharacterTask.SPELL, ["house", "tree", "stone"], count=9, shots=2, seed=0)) == 1
    assert not make_questions(CharacterTask.SPELL, ["house"], count=9, shots=2, seed=0)


@pytest.mark.parametrize(
    "text, valid, invalid",
    [
        (b"", True, 0),
        ("né 猫🙂".encode(), True, 0),
        ("猫".encode()[:2], True, 0),  # only begun
        (b"a\x80b", False, 1),
        ("猫".encode()[:2] + b"a", False, 2),
        (b"\xff\xfe", False, 2),
        (b"\xed\xa0\x80", False, 3),  # half of a surrogate pair
    ],
)
def test_validity_forgives_the_open_end_alone(text: bytes, valid: bool, invalid: int) -> None:
    assert is_valid_utf8(text) is valid and invalid_bytes(text) == invalid


def test_ten_scripts_have_ten_different_prompts() -> None:
    assert len(SCRIPT_PROMPTS) == len(set(SCRIPT_PROMPTS.values())) == 10


def test_a_word_is_letters_alone() -> None:
    assert find_words("²²²² a²²² ½½½½ ⅧⅧⅧⅧ word") == ["word"]
