"""The library's steps against torch's, slot by slot."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megabyte_distill.alphabet import BOS_BYTE
from megabyte_distill.config.model import ByteMixer, ChunkPooling, DechunkMode
from megabyte_distill.config.training import KernelMode
from megabyte_distill.inference import engine
from megabyte_distill.inference.engine_cpu import CpuSlots, refusal
from megabyte_distill.inference.engine_slots import Slots, TorchSlots
from megabyte_distill.inference.state_guess import StateGuess
from megabyte_distill.kernels import build, step_library
from megabyte_distill.model.student import Student
from tests.tiny_student import FAMILIES, enlarged, tiny_backbone, tiny_student

pytestmark = pytest.mark.usefixtures("groups", "step_library")


def read_along(slots: Slots, turns: int) -> list[Tensor]:
    """Logits on a random way through every call: ragged rows, drafts, bytes taken back, documents begun anew."""
    random = torch.Generator().manual_seed(1)

    def draw(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=random)

    found = []
    count = 5
    every = torch.arange(count)
    slots.reset(every)
    found.append(
        slots.read(torch.full((count, 1), BOS_BYTE), torch.ones(count, 1, dtype=torch.bool), every, saved=False)
    )
    slots.keep(torch.ones(count, dtype=torch.int64))
    for turn in range(turns):
        rows = (draw(4, count) > 0).nonzero()[:, 0]
        if not rows.shape[0]:
            continue
        found.append(slots.step(draw(254, rows.shape[0]), torch.zeros(rows.shape[0], dtype=torch.bool), rows))
        if turn % 3 == 0:  # prompts, ragged
            length = 1 + int(draw(40, 1))
            found.append(
                slots.read(draw(254, rows.shape[0], length), draw(3, rows.shape[0], length) == 0, rows, saved=False)
            )
            slots.keep(1 + draw(length, rows.shape[0]))
        else:
            slots.save(rows)
            length = 1 + int(draw(6, 1))
            byte_ids, bits = draw(254, rows.shape[0], length), draw(2, rows.shape[0], length) == 0
            bits[:, 0] = True
            for place in range(length - 1):
                found.append(slots.step(byte_ids[:, place].contiguous(), bits[:, place], rows))
            found.append(slots.read(byte_ids, bits, rows, saved=True))
            slots.keep(1 + draw(length, rows.shape[0]))
        if turn == 17:
            slots.reset(rows[:1])
            found.append(
                slots.read(torch.full((1, 1), BOS_BYTE), torch.ones(1, 1, dtype=torch.bool), rows[:1], saved=False)
            )
            slots.keep(torch.ones(1, dtype=torch.int64))
    return found


def assert_agree(student: Student, count: int, read: Callable[[Slots], list[Tensor]]) -> None:
    student.eval()
    assert refusal(student) is None
    cpu, usual = (read(kind(student, count, StateGuess(32, torch.device("cpu")))) for kind in (CpuSlots, TorchSlots))
    for got, expected in zip(cpu, usual, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


def assert_steps_agree(student: Student, turns: int = 19) -> None:
    assert_agree(student, 5, partial(read_along, turns=turns))


@pytest.mark.parametrize("pooling", list(ChunkPooling))
@pytest.mark.parametrize("mode", [DechunkMode.HARD, DechunkMode.CAUSAL])
@pytest.mark.parametrize("mixer", list(ByteMixer))
def test_steps_are_those_of_torch(mixer: ByteMixer, mode: DechunkMode, pooling: ChunkPooling) -> None:
    assert_steps_agree(tiny_student(mixer, mode, pooling=pooling))


def test_a_byte_window_that_ends_inside_its_second_vector_steps_alike() -> None:
    assert_steps_agree(tiny_student(ByteMixer.LOCAL_ATTENTION, byte_window=21))


@pytest.mark.parametrize("ngrams", [(2,), (3, 4, 8)])
def test_ngrams_are_hashed_alike(ngrams: tuple[int, ...]) -> None:
    assert_steps_agree(tiny_student(ngrams=ngrams))


SHAPES: dict[str, dict[str, Any]] = {
    **FAMILIES,
    "qwen2": {**FAMILIES["qwen2"], "num_query_groups": 4},
    "qwen3": {**FAMILIES["qwen3"], "head_dim": 20, "num_query_groups": 1},
    "olmo3": {**FAMILIES["olmo3"], "sliding_window": 3},
    # heads of a group in two parts, values and windows that end inside a vector
    "llama": {
        "num_attention_heads": 6, "num_query_groups": 1, "head_dim": 40, "sliding_window": 21, "sliding_layers": (1,),
    },
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_every_familys_layers_step_alike(shape: str) -> None:
    student = tiny_student()
    student.backbone = enlarged(tiny_backbone(**SHAPES[shape]))
    assert_steps_agree(student)


def fill_up(slots: Slots) -> list[Tensor]:
    """Logits of two slots, each byte a chunk: one passes 64 and 128 chunks by prompts, the other 64 byte by byte."""
    random = torch.Generator().manual_seed(2)
    found = []
    slots.reset(torch.arange(2))
    for row, lengths in ((0, [60]), (1, [60]), (1, [1] * 8), (0, [30, 60, 1])):
        for length in lengths:
            rows, byte_ids = torch.tensor([row]), torch.randint(254, (1, length), generator=random)
            found.append(slots.read(byte_ids, torch.ones(1, length, dtype=torch.bool), rows, saved=False))
            slots.keep(torch.tensor([length]))
    return found


@pytest.mark.parametrize("shape", ["qwen2", "llama"])
def test_chunks_that_outgrow_a_slots_room_stay_what_they_were(shape: str) -> None:
    student = tiny_student()
    student.backbone = enlarged(tiny_backbone(**SHAPES[shape]))
    assert_agree(student, 2, fill_up)


@pytest.mark.parametrize("shape", SHAPES)
def test_an_exports_layers_step_alike(shape: str) -> None:
    from megabyte_distill.hf.torch_backbone import TorchBackbone

    student = tiny_student()
    student.backbone = enlarged(TorchBackbone(tiny_backbone(**SHAPES[shape]).backbone_config))
    assert_steps_agree(student)


@pytest.mark.parametrize("mixer", [ByteMixer.MAMBA2, ByteMixer.LOCAL_ATTENTION])
def test_threads_share_the_work(mixer: ByteMixer) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert_steps_agree(tiny_student(mixer), turns=6)
    finally:
        torch.set_num_threads(before)


def test_what_the_library_does_not_take_goes_to_torch_or_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    student = tiny_student()
    assert isinstance(engine.Engine(student).make_slots(2), CpuSlots)
    assert isinstance(engine.Engine(student, kernels=KernelMode.REFERENCE).make_slots(2), TorchSlots)
    half = tiny_student().bfloat16()
    assert isinstance(engine.Engine(half).make_slots(2), TorchSlots)
    with pytest.raises(ValueError, match=r"got torch\.bfloat16 weights on cpu, expected fp32"):
        engine.Engine(half, kernels=KernelMode.FUSED)
    monkeypatch.setattr(build, "step_library_path", lambda: Path("nowhere/step.so"))
    assert isinstance(engine.Engine(student).make_slots(2), TorchSlots)
    with pytest.raises(ValueError, match="build it with: python -m megabyte"):
        engine.Engine(student, kernels=KernelMode.FUSED)


def test_a_library_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "step.so").write_bytes(b"no library")
    with pytest.raises(ValueError, match=r"step\.so cannot be loaded"):
        step_library.load(tmp_path / "step.so")
