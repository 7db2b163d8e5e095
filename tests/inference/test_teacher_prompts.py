"""Prompts of the teacher that examples/tiny embeds: whatever its tokens spell is read, however unlikely."""

from __future__ import annotations

import json
import lzma
import random
import string
from pathlib import Path

import pytest
import torch

from megabyte_distill.conversion.teacher_folder import Teacher, load_teacher
from megabyte_distill.inference.generation import GenerationSettings
from megabyte_distill.inference.teacher_generation import TeacherGeneration
from tools.convert_checkpoint import main as convert

TINY = Path(__file__).resolve().parents[2] / "examples" / "tiny"


@pytest.fixture(scope="module")
def demo(groups: None, tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    folder = tmp_path_factory.mktemp("teacher") / "converted"
    assert convert(["import", "--hf-model", str(TINY / "teacher"), "--megatron-path", str(folder)]) == 0
    teacher = load_teacher(folder, dtype=torch.float32)
    teacher.backbone.requires_grad_(False).eval()
    return teacher


def passages() -> list[bytes]:
    """Held-out text as it is, mistyped, and letters drawn at random."""
    drawn = random.Random(5)
    with lzma.open(TINY / "heldout.jsonl.xz", "rt", encoding="utf-8") as lines:
        text = json.loads(next(lines))["text"]
    found = [text[first : first + 100].encode() for first in range(0, 1000, 250)]
    for passage in found[:4]:
        mistyped = bytearray(passage)
        for place in range(0, len(mistyped), 7):
            mistyped[place] = drawn.choice(string.ascii_lowercase).encode()[0]
        found.append(bytes(mistyped))
    letters = string.ascii_letters + string.punctuation
    found += ["".join(drawn.choices(letters, k=60)).encode() for _ in range(4)]
    return [*found, bytes(range(254)), "\0né 日本 🙂".encode()]


@pytest.mark.parametrize("paths", [1, 2, 3, 4])
def test_what_is_mistyped_is_read(demo: Teacher, paths: int) -> None:
    prompts = passages()
    settings = GenerationSettings(max_new_bytes=1, paths=paths)
    running = TeacherGeneration(demo.backbone, demo.token_bytes, prompts, settings)
    assert [len(bits) for bits in running.prompt_bits] == [len(prompt) for prompt in prompts]
    assert all(any(bits) for bits in running.prompt_bits)
