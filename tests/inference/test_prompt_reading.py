"""Prompts whose front is read many bytes at once under the router's boundaries, and their end along the paths."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from megabyte_distill.alphabet import BOS_BYTE
from megabyte_distill.config.model import ByteMixer, ChunkPooling, DechunkMode, RouterKind
from megabyte_distill.inference import prompt_reading
from megabyte_distill.inference.engine import Engine
from megabyte_distill.inference.generation import GenerationMode, GenerationSettings, generate
from megabyte_distill.inference.prompt_reading import read_prompts
from megabyte_distill.inference.prompts import PATH_WINDOW
from megabyte_distill.inference.sampling import Sampling
from megabyte_distill.model.student import Given, Parts, RouterDecides, Student
from tools.generate import build_parser

LONG = "a prompt of 日本語, é and some more words".encode() + bytes(range(60))
PROMPTS = [LONG, b"", b"short", LONG[20:57], b"\0" * 30]


class Row:
    """One document as forward() reads it."""

    chunk_bucket = 1

    def __init__(self, text: bytes) -> None:
        self.byte_ids = torch.tensor([BOS_BYTE, *text])
        self.bits = self.byte_ids == BOS_BYTE
        self.is_real = torch.ones_like(self.bits)
        self.cu_seqlens = torch.tensor([0, len(text) + 1], dtype=torch.int32)


def router_bits(student: Student, text: bytes) -> list[bool]:
    p = student(Row(text), RouterDecides(), Parts.ENCODER | Parts.ROUTER).p
    return (p > 0.5)[1:].tolist()


@pytest.fixture(params=[(DechunkMode.HARD, ByteMixer.CONV), (DechunkMode.CAUSAL, ByteMixer.MAMBA2)])
def student(request: pytest.FixtureRequest, make_student: Callable[..., Student]) -> Student:
    return make_student(*request.param)


@pytest.mark.parametrize("block", [1, 7, 512])
def test_the_front_is_cut_by_the_router_and_the_end_by_the_paths(
    student: Student, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompt_reading, "_BLOCK", block)
    assert_reads_as_forward(student)


@pytest.mark.parametrize(
    "part",
    [
        {"byte_ngram_tables": (2, 4), "byte_ngram_rows": 64},
        {"router": RouterKind.LINEAR},
        {"mixer": ByteMixer.LOCAL_ATTENTION},
        {"pooling": ChunkPooling.MEAN_LAST},
    ],
    ids=lambda part: next(iter(part)),
)
def test_every_other_part_is_read_so(
    part: dict[str, Any], make_student: Callable[..., Student], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompt_reading, "_BLOCK", 7)
    assert_reads_as_forward(make_student(**part))


def assert_reads_as_forward(student: Student) -> None:
    """The front is under the router's bits, the end under the paths', and what follows is what forward() says."""
    read = read_prompts(student, PROMPTS, 4, path_window=12)
    path = read.log_weights.argmax(-1)
    bits = read.history(path)
    assert [len(row) for row in bits] == [len(prompt) for prompt in PROMPTS]
    for prompt, row in zip(PROMPTS, bits, strict=True):
        front = max(len(prompt) - 12, 0)
        assert row[:front] == router_bits(student, prompt)[:front]
    assert 0 < sum(bits[0][:-12]) < len(LONG) - 12
    _, found = read.settle(path)
    for index, prompt in enumerate(PROMPTS):
        logits = student(Row(prompt), Given(torch.tensor([True, *bits[index]]))).logits[-1]
        assert torch.allclose(found[index], logits.float().log_softmax(-1), atol=2e-5)


def test_a_prompt_no_longer_than_its_end_is_read_along_the_paths_alone(student: Student) -> None:
    whole, rest = read_prompts(student, PROMPTS, 4), read_prompts(student, PROMPTS, 4, path_window=len(LONG))
    assert torch.equal(whole.log_weights, rest.log_weights)
    cut = read_prompts(student, PROMPTS, 4, path_window=len(LONG) - 1)
    assert torch.allclose(cut.log_weights[1:], whole.log_weights[1:], atol=1e-4)
    assert not torch.allclose(cut.log_weights[0], whole.log_weights[0], atol=1e-4)


def test_the_front_is_refused_before_the_backbone_reads_any_of_it(
    student: Student, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = student.backbone.backbone_config
    student.backbone.backbone_config = replace(config, max_position_embeddings=5)
    monkeypatch.setattr(prompt_reading, "_BLOCK", 16)

    def step(*_: Any) -> None:
        raise AssertionError("the backbone was asked")

    monkeypatch.setattr(student, "steps", step)
    with pytest.raises(ValueError, match=f"prompt 1 of 5 is too long: it has {len(LONG)} bytes") as refused:
        read_prompts(student, PROMPTS, 4, path_window=12)
    fitting = next(size for size in range(len(LONG)) if 1 + sum(router_bits(student, LONG)[: size + 1]) > 5)
    assert f"the first {fitting} of them fill the 5 positions" in str(refused.value)


def test_an_end_that_is_too_long_counts_the_front(student: Student) -> None:
    needed = 1 + sum(router_bits(student, LONG)[:-12])
    config = student.backbone.backbone_config
    student.backbone.backbone_config = replace(config, max_position_embeddings=needed)
    with pytest.raises(
        ValueError, match=rf"it has {len(LONG) + 12} bytes, and the first (\d+) .* {needed} pos"
    ) as refused:
        read_prompts(student, [LONG + b" a b c d e f"], 1, path_window=24)
    fitting = int(re.findall(r"the first (\d+) ", str(refused.value))[0])
    assert len(LONG) - 12 <= fitting < len(LONG) + 12


@pytest.mark.parametrize("mode", GenerationMode)
def test_generation_goes_on_behind_a_long_prompt(student: Student, mode: GenerationMode) -> None:
    settings = GenerationSettings(max_new_bytes=8, sampling=Sampling(temperature=0), mode=mode, path_window=9)
    results = generate(student, PROMPTS, settings)
    assert [len(result.prompt_bits) for result in results] == [len(prompt) for prompt in PROMPTS]
    assert list(results[0].prompt_bits[:-9]) == router_bits(student, LONG)[:-9]
    if mode is GenerationMode.JOINT:
        for engine in (Engine(student, max_batch_size=2), Engine(student, max_batch_size=2, speculate=3)):
            found = engine.generate(PROMPTS, settings)
            assert [row.byte_ids for row in found] == [row.byte_ids for row in results]
            assert [row.prompt_bits for row in found] == [row.prompt_bits for row in results]


def test_the_tool_has_the_same_window() -> None:
    assert build_parser().get_default("path_window") == PATH_WINDOW
