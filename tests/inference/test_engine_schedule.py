"""Which rows of an engine step when, and that drafts leave the distribution of samples as it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from megabyte_distill.alphabet import END_OF_DOCUMENT_CLASS, joint_class
from megabyte_distill.config.training import KernelMode
from megabyte_distill.inference.engine import Engine
from megabyte_distill.inference.generation import GenerationSettings
from megabyte_distill.inference.sampling import Sampling
from megabyte_distill.model.student import Student
from tests.inference.conftest import tiny_student
from tests.inference.test_consistency import of_two_letters
from tests.inference.test_generation import Row

DRAWS, BYTES = 3000, 4


class Scripted(Engine):
    """Computes everything and writes what it is told, the document's end behind it."""

    classes: Sequence[Sequence[int]]
    """Of each prompt."""

    def pick(self, log_probabilities: Tensor, sampling: Sampling, uniform: Tensor, **where: Any) -> Tensor:
        told = [self.classes[prompt] for prompt in where["prompts"]]
        at = where["places"]
        return torch.tensor([[*own, END_OF_DOCUMENT_CLASS][place] for own, place in zip(told, at, strict=True)])


def scripted(student: Student, texts: Sequence[bytes], ends: Sequence[set[int]], size: int) -> Scripted:
    """Chunks of text i end behind the bytes ``ends[i]``."""
    engine = Scripted(student, max_batch_size=size, kernels=KernelMode.REFERENCE)
    engine.classes = [
        [joint_class(byte, int(place in own)) for place, byte in enumerate(text)]
        for text, own in zip(texts, ends, strict=True)
    ]
    return engine


@pytest.mark.parametrize(
    ("ends", "steps", "together"),
    [
        # all at once, and what ends the text is not read any more
        ([{3, 7, 11}] * 4, [4] * 11, [[0, 1, 2, 3]] * 2),
        # row 0 waits at byte 1 until row 1 comes to byte 4; the others go on
        ([{1}, {4}, set(), set()], [4, 3, 3, 3, 2, 4, 4, 4, 4, 4, 4, 3, 1, 1], [[0, 1]]),
    ],
)
def test_rows_at_a_chunks_end_step_the_backbone_in_one_call_and_others_go_on(
    student: Student, ends: list[set[int]], steps: list[int], together: list[list[int]]
) -> None:
    read: list[int] = []
    calls: list[list[int]] = []

    def watched(step: Callable[..., Any], note: Callable[..., None]) -> Callable[..., Any]:
        def noted(*arguments: Any) -> Any:
            note(*arguments)
            return step(*arguments)

        return noted

    encoder, backbone = student.byte_encoder, student.backbone
    encoder.step = watched(encoder.step, lambda ids, *_: read.append(len(ids)))  # type: ignore[method-assign]
    backbone.step = watched(backbone.step, lambda chunks, cache, rows: calls.append(rows.tolist()))
    engine = scripted(student, [b"twelve bytes"] * 4, ends, 4)
    session = engine.begin([b""] * 4, GenerationSettings(max_new_bytes=12), prompt_bits=[()] * 4)
    read.clear()
    calls.clear()
    for _ in session:
        pass
    assert [row.byte_ids for row in session.results()] == [b"twelve bytes"] * 4
    assert calls == together
    assert read == steps


def test_a_finished_rows_place_is_taken_at_once(student: Student) -> None:
    texts = [b"ab", b"a text of twenty-four b.", b"", b"to the stop!, no further", b"abc", b"z"]
    engine = scripted(student, texts, [{1}] * len(texts), 2)
    settings = GenerationSettings(max_new_bytes=24, stop=(b"p!",))
    session = engine.begin(["x" * place for place in range(len(texts))], settings)
    events = [new.rows for new in session]
    last = {row: max(at for at, rows in enumerate(events) if row in rows) for row in range(len(texts))}
    first = {row: min(at for at, rows in enumerate(events) if row in rows) for row in range(len(texts))}
    assert [first[row] - last[before] for before, row in ((0, 2), (2, 3), (3, 4))] == [1, 1, 1]
    assert last[0] < last[2] < last[3] < last[1] and first[5] == min(last[1], last[4]) + 1
    assert [row.byte_ids for row in session.results()] == [*texts[:3], b"to the sto", *texts[4:]]


def chances_of(student: Student, text: bytes = b"", bits: tuple[bool, ...] = ()) -> dict[tuple[int, ...], float]:
    """Probability of every sequence of pairs behind a text, everything read again for each; the end closes one."""
    if len(text) == BYTES:
        return {(): 1.0}
    following = student(Row(list(text), list(bits))).logits[-1].double().softmax(-1)
    found = {(END_OF_DOCUMENT_CLASS,): float(following[END_OF_DOCUMENT_CLASS])}
    for byte in b"ab":
        for bit in (False, True):
            pair = joint_class(byte, int(bit))
            rest = chances_of(student, text + bytes([byte]), (*bits, bit))
            found |= {(pair, *more): float(following[pair]) * chance for more, chance in rest.items()}
    return found


class Credulous(Engine):
    """Takes every draft for right."""

    def pick(self, log_probabilities: Tensor, sampling: Sampling, uniform: Tensor, **where: Any) -> Tensor:
        joint = super().pick(log_probabilities, sampling, uniform, **where)
        self.written: dict[tuple[int, int], Tensor] = getattr(self, "written", {})
        for row, key in enumerate(zip(where["prompts"].tolist(), where["places"].tolist(), strict=True)):
            if where["drafted"][row] >= 0:
                self.written[key] = joint[row].clone()
            else:
                joint[row] = self.written.get(key, joint[row])
        return joint


def p_value(drawn: Counter[tuple[int, ...]], chances: dict[tuple[int, ...], float]) -> float:
    """Of the chi-square test; what is expected fewer than five times is one cell."""
    assert drawn.keys() <= chances.keys()
    cells: Counter[tuple[int, ...] | None] = Counter()
    wanted: Counter[tuple[int, ...] | None] = Counter()
    for key, chance in chances.items():
        cell = key if chance * DRAWS >= 5 else None
        cells[cell] += drawn[key]
        wanted[cell] += chance * DRAWS  # type: ignore[assignment]
    statistic = sum((cells[cell] - wanted[cell]) ** 2 / wanted[cell] for cell in wanted)
    degrees = torch.tensor((len(wanted) - 1) / 2)
    assert degrees > 15
    return float(torch.special.gammaincc(degrees, torch.tensor(statistic / 2)))


@torch.no_grad()
def test_samples_with_drafts_are_distributed_as_the_model_says() -> None:
    """All texts of four bytes over two letters; at fixed seeds. One in a thousand right rules would fail."""
    torch.manual_seed(0)
    student = tiny_student()
    decoder = student.byte_decoder
    # every text has its chance, and what the backbone says of a chunk decides much
    for name, std in (("head", 0.3), ("residual", 0.05), ("input.value", 1.0), ("input.gate", 1.0), ("input.out", 1.0)):
        torch.nn.init.normal_(decoder.get_parameter(f"{name}.weight"), std=std)
    student = of_two_letters(student)
    chances = chances_of(student)
    assert sum(chances.values()) == pytest.approx(1.0, abs=1e-6)
    settings, p_values = GenerationSettings(max_new_bytes=BYTES, sampling=Sampling(), seed=1), []
    for kind, speculate in ((Engine, 0), (Engine, 3), (Credulous, 3)):
        engine = kind(student, max_batch_size=500, speculate=speculate, kernels=KernelMode.REFERENCE)
        drawn = Counter(
            tuple(joint_class(byte, int(bit)) for byte, bit in zip(row.byte_ids, row.bits, strict=True))
            + (END_OF_DOCUMENT_CLASS,) * row.ended
            for row in engine.generate([b""] * DRAWS, settings, prompt_bits=[()] * DRAWS)
        )
        p_values.append(p_value(drawn, chances))
        if speculate:
            assert DRAWS / 10 < engine.counts.accepted <= engine.counts.drafted
    assert p_values[0] > 1e-3 and p_values[1] > 1e-3, p_values
    assert p_values[2] < 1e-6, p_values
