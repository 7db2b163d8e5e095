"""Continuations under the filter: what prompts share is read once, and nothing changes by it."""

from __future__ import annotations

import math

import pytest
import torch

from megabyte_distill.evaluation.continuations import byte_bits, score_continuations
from megabyte_distill.inference.bit_paths import BitPaths
from megabyte_distill.inference.scoring import score_paths
from megabyte_distill.model.student import Student
from tests.tiny_student import tiny_student

pytestmark = pytest.mark.usefixtures("world")
PAIRS = [
    (b"the house", b" on a hill"),
    (b"the house", b" of"),
    (b"the horse", b" ran"),
    ("né ".encode() + b"\xe7", b"\x8c\xab"),  # cut inside a character
    (b"", b"a"),
    (b"the house", b""),
    (b"x\x80\0", b"\xc3"),
]


@pytest.fixture(scope="module")
def student(world: object) -> Student:
    torch.manual_seed(3)
    return tiny_student().eval()


def filter_nats(student: Student, text: bytes) -> float:
    return float(score_paths(student, [torch.tensor(list(text), dtype=torch.int64)], paths=3).filter_bits) * math.log(2)


@pytest.mark.parametrize("batch", [1, 2, 32])
def test_each_pair_is_what_it_is_alone(student: Student, batch: int) -> None:
    found = score_continuations(student, PAIRS, paths=3, batch=batch)
    for (prompt, continuation), result in zip(PAIRS, found, strict=True):
        before = filter_nats(student, prompt) if prompt else 0.0
        whole = filter_nats(student, prompt + continuation)
        assert result.prompt_nats == pytest.approx(before, abs=1e-4)
        assert result.nats == pytest.approx(whole - before, abs=1e-4)


def test_greedy_is_told(student: Student) -> None:
    running = BitPaths(student, 1, 3)
    for byte in b"ab":
        running.advance(torch.tensor([byte]))
    likeliest = []
    for _ in range(3):
        likeliest.append(int(running.next_byte_log_probabilities().argmax()))
        running.advance(torch.tensor(likeliest[-1:]))
    wrong = [*likeliest[:2], (likeliest[2] + 1) % 128]
    pairs = [(b"ab", bytes(byte for byte in taken if byte < 254)) for taken in (likeliest, wrong)]
    assert [found.is_greedy for found in score_continuations(student, pairs, paths=3)] == [True, False]


def test_bits_of_bytes_add_up(student: Student) -> None:
    texts = [prompt + continuation for prompt, continuation in PAIRS] + [b""]
    for text, bits in zip(texts, byte_bits(student, texts, paths=3, batch=3), strict=True):
        assert bits.shape == (len(text),)
        assert bits.sum() * math.log(2) == pytest.approx(filter_nats(student, text) if text else 0.0, abs=1e-4)


def test_bytes_that_are_marks_are_refused(student: Student) -> None:
    with pytest.raises(ValueError, match="text 1 has byte 254"):
        score_continuations(student, [(b"", b"a"), (b"\xfe", b"a")])
