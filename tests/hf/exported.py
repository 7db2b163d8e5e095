"""A tiny student beside its export, and what the megatron student says about bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megabyte_distill.alphabet import BOS_BYTE, PAD_BYTE
from megabyte_distill.config.model import ByteMixer, DechunkMode
from megabyte_distill.conversion.model_config import ModelConfig
from megabyte_distill.conversion.student_export import export_student
from megabyte_distill.inference.bit_paths import BitPaths
from megabyte_distill.model.student import Student
from tests.conversion.conftest import write_tokenizer
from tests.tiny_student import BYTE_SIDE, enlarged, tiny_backbone

PATHS = 3
TEXTS = [b"The quick", b"", "né 猫!".encode(), b"a"]
"""Ragged, one empty, one of two bytes a character."""


@dataclass(frozen=True)
class Exported:
    """A student of megatron's layers and its folder."""

    student: Student
    config: ModelConfig
    tokenizer: Path
    folder: Path

    def load(self, **options: Any) -> Any:
        """The folder's model."""
        return load(self.folder, **options)


def load(folder: Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options)


def make_exported(
    root: Path,
    mixer: ByteMixer = ByteMixer.CONV,
    mode: DechunkMode = DechunkMode.HARD,
    *,
    dtype: torch.dtype = torch.float32,
    side: Mapping[str, Any] | None = None,
    **backbone: Any,
) -> Exported:
    """Needs process groups. Weights are of a size that makes every part matter."""
    student = Student(
        replace(BYTE_SIDE, byte_mixer=mixer, dechunk_mode=mode, **(side or {})),
        tiny_backbone(**{"vocab_size": 150, "max_position_embeddings": 64, **backbone}),
    ).eval()
    enlarged(student)
    nn.init.normal_(student.byte_decoder.head.get_parameter("weight"), std=0.4)
    config = ModelConfig(backbone=student.backbone.backbone_config, byte_side=student.byte_side_config)
    tokenizer = root / "teacher_tokenizer"
    tokenizer.mkdir()
    write_tokenizer(tokenizer)
    exported = Exported(student, config, tokenizer, root / "exported")
    export_student(student, config, tokenizer, exported.folder, dtype=dtype, paths=PATHS)
    return exported


def native_log_probabilities(student: Student, text: bytes, paths: int = PATHS) -> Tensor:
    """log P(next byte) [L + 1, 256] behind BOS and behind each byte of the text, under the filter."""
    running = BitPaths(student, 1, paths)
    found = [running.next_byte_log_probabilities()]
    for byte in text:
        running.advance(torch.tensor([byte]))
        found.append(running.next_byte_log_probabilities())
    return torch.cat(found)


def native_greedy(student: Student, prompt: bytes, count: int, paths: int = PATHS) -> list[int]:
    """The likeliest next byte under the filter, ``count`` times; PAD is never taken."""
    running = BitPaths(student, 1, paths)
    for byte in prompt:
        running.advance(torch.tensor([byte]))
    taken = []
    for _ in range(count):
        chances = running.next_byte_log_probabilities()
        chances[:, PAD_BYTE] = -torch.inf
        taken.append(int(chances.argmax()))
        running.advance(torch.tensor(taken[-1:]))
    return taken


def padded(texts: Sequence[bytes], side: str, *, bos: bool = True) -> tuple[Tensor, Tensor]:
    """(input_ids, attention_mask) [B, L] of texts behind BOS."""
    rows = [[*([BOS_BYTE] if bos else []), *text] for text in texts]
    longest = max(len(row) for row in rows)
    ids, masks = [], []
    for row in rows:
        room = longest - len(row)
        left, right = (room, 0) if side == "left" else (0, room)
        ids.append([PAD_BYTE] * left + row + [PAD_BYTE] * right)
        masks.append([0] * left + [1] * len(row) + [0] * right)
    return torch.tensor(ids), torch.tensor(masks)
