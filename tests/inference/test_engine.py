"""The engine against plain generation: the same bytes whatever runs beside a row, in whatever order, drafted or not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from megabyte_distill.config.model import ByteMixer, ChunkPooling, DechunkMode
from megabyte_distill.inference.engine import Engine
from megabyte_distill.inference.generation import Generated, GenerationSettings, generate
from megabyte_distill.inference.sampling import Sampling
from megabyte_distill.model.student import Student

GREEDY = Sampling(temperature=0)
SAMPLED = Sampling(temperature=0.8, top_p=0.95)
PROMPTS: list[str | bytes] = [
    "The king",
    "",
    b"half \xe6\x97",
    "a much longer prompt, é, and so long that it is read in blocks: " + "words and words " * 9,
    "日本語 العربية 🙂",
    b"\x80\xff"[:1] + b"\0 no UTF-8",
    "x",
]
STEPPED = (DechunkMode.HARD, DechunkMode.CAUSAL)


def assert_same(got: Sequence[Generated], expected: Sequence[Generated]) -> None:
    """Equal bytes, bits and endings; log-probabilities as near as fp32 sums in another order are."""
    assert len(got) == len(expected)
    for own, other in zip(got, expected, strict=True):
        assert replace(own, log_probability=0.0) == replace(other, log_probability=0.0)
        assert own.log_probability == pytest.approx(other.log_probability, abs=2e-3)


@pytest.mark.parametrize("speculate", [0, 3])
@pytest.mark.parametrize("pooling", list(ChunkPooling))
@pytest.mark.parametrize("mode", STEPPED)
@pytest.mark.parametrize("mixer", list(ByteMixer))
def test_every_kind_of_student_gives_the_bytes_of_plain_generation(
    make_student: Callable[..., Student], mixer: ByteMixer, mode: DechunkMode, pooling: ChunkPooling, speculate: int
) -> None:
    student = make_student(mode, mixer, pooling)
    settings = GenerationSettings(max_new_bytes=24, sampling=GREEDY)
    engine = Engine(student, max_batch_size=3, speculate=speculate)
    assert_same(engine.generate(PROMPTS, settings), generate(student, PROMPTS, settings))


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED, Sampling()])
@pytest.mark.parametrize("speculate", [0, 1, 2, 5, 16])
def test_drafts_change_no_byte(student: Student, sampling: Sampling, speculate: int) -> None:
    settings = GenerationSettings(max_new_bytes=40, sampling=sampling, seed=3)
    expected = generate(student, PROMPTS, settings)
    for size in (1, 4, 32):
        assert_same(Engine(student, max_batch_size=size, speculate=speculate).generate(PROMPTS, settings), expected)
