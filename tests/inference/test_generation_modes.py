"""What changes a generation: bytes along paths, stop texts, UTF-8, the paper's reading, the context's end."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch

from megabyte_distill.alphabet import BOS_BYTE, PAD_BYTE, joint_class
from megabyte_distill.config.model import DechunkMode
from megabyte_distill.config.training import KernelMode
from megabyte_distill.inference.bit_paths import BitPaths
from megabyte_distill.inference.engine import Engine
from megabyte_distill.inference.generation import (
    Generated,
    Generation,
    GenerationMode,
    GenerationSettings,
    NewBytes,
    PromptReading,
    generate,
    new_bytes,
    stream,
)
from megabyte_distill.inference.official import OfficialReader
from megabyte_distill.inference.sampling import Sampling
from megabyte_distill.inference.utf8 import Utf8Mode, count_invalid
from megabyte_distill.model.student import RouterDecides, Student
from tests.inference.test_generation import Row

GREEDY = Sampling(temperature=0)
PROMPTS = [b"The king", b"", b"half \xe6\x97", "a much longer prompt, é".encode(), b"\xf0\x9f broken \xc3"]
BYTES = GenerationSettings(max_new_bytes=16, mode=GenerationMode.BYTES)
JOINT = GenerationSettings(max_new_bytes=16)


def naive_bytes(student: Student, prompt: bytes, count: int, paths: int) -> tuple[bytes, list[bool], float]:
    """The likeliest next byte under the filter, one after the other: (bytes, bits of everything, log-probability)."""
    running, written, total = BitPaths(student, 1, paths, keep_history=True), bytearray(), 0.0
    for byte in prompt:
        running.advance(torch.tensor([byte]))
    for _ in range(count):
        chances = running.next_byte_log_probabilities()[0]
        chances[PAD_BYTE] = -torch.inf
        byte = int(chances.argmax())
        total += float(chances[byte])
        if byte == BOS_BYTE:
            break
        written.append(byte)
        running.advance(torch.tensor([byte]))
    return bytes(written), running.history(running.log_weights.argmax(-1))[0], total


@pytest.mark.parametrize("paths", [1, 4])
def test_greedy_bytes_are_the_likeliest_under_the_filter(student: Student, paths: int) -> None:
    results = generate(student, PROMPTS, replace(BYTES, paths=paths, sampling=GREEDY))
    for prompt, result in zip(PROMPTS, results, strict=True):
        written, bits, total = naive_bytes(student, prompt, 16, paths)
        assert result.byte_ids == written
        assert [*result.prompt_bits, *result.bits] == bits
        assert result.log_probability == pytest.approx(total, abs=1e-3)


def test_settings_act_on_the_sums_over_bits(student: Student) -> None:
    """Each byte of a sample is among the likeliest three bytes, whatever the pairs are."""
    result = generate(student, [b"some"], replace(BYTES, sampling=Sampling(top_k=3), seed=2))[0]
    running = BitPaths(student, 1, 4)
    for byte in b"some":
        running.advance(torch.tensor([byte]))
    ranks = []
    for byte in result.byte_ids:
        chances = running.next_byte_log_probabilities()[0]
        ranks.append(int((chances > chances[byte]).sum()))
        running.advance(torch.tensor([byte]))
    assert ranks and max(ranks) in (1, 2)


class Constant(torch.nn.Module):
    """A head that says the same of everything."""

    def __init__(self, chances: dict[tuple[int, int], float]) -> None:
        super().__init__()
        self.logits = torch.full((512,), -1e4)
        for (byte, bit), chance in chances.items():
            self.logits[joint_class(byte, bit)] = math.log(chance)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.logits.expand(*x.shape[:-1], -1)


A, B, C = b"abc"
A0, A1, B0 = (A, False), (A, True), (B, False)


@pytest.mark.parametrize(
    ("sampling", "pairs", "summed"),
    [
        (Sampling(top_k=1), {B0}, {A}),
        (Sampling(temperature=0), {B0}, {A}),
        (Sampling(top_k=3), {B0, A0, A1}, {A, B, C}),
        (Sampling(top_p=0.45), {B0, A0}, {A}),
        (Sampling(min_p=0.7), {B0, A0, A1}, {A}),
    ],
)
def test_settings_act_on_pairs_in_joint_generation_and_on_sums_in_that_of_bytes(
    student: Student, sampling: Sampling, pairs: set[tuple[int, bool]], summed: set[int]
) -> None:
    """b with bit 0 is the likeliest pair, a the likeliest byte."""
    student.byte_decoder.head = Constant({(A, 0): 0.26, (A, 1): 0.24, (B, 0): 0.30, (C, 0): 0.20})
    joint = replace(JOINT, sampling=sampling, max_new_bytes=6)
    engine = Engine(student, kernels=KernelMode.REFERENCE)
    for results in (generate(student, [b"x"] * 16, joint), engine.generate([b"x"] * 16, joint)):
        assert {pair for row in results for pair in zip(row.byte_ids, row.bits, strict=True)} == pairs
    results = generate(student, [b"x"] * 16, replace(joint, mode=GenerationMode.BYTES))
    assert {byte for row in results for byte in row.byte_ids} == summed


@pytest.mark.parametrize("settings", [BYTES, replace(JOINT, reading=PromptReading.OFFICIAL)])
@pytest.mark.parametrize("utf8", Utf8Mode)
def test_a_ragged_batch_equals_each_prompt_alone(
    student: Student, settings: GenerationSettings, utf8: Utf8Mode
) -> None:
    settings = replace(settings, seed=3, utf8=utf8, stop=(b"e",))
    together = generate(student, PROMPTS, settings)
    for index, prompt in enumerate(PROMPTS):
        alone = generate(student, [prompt], replace(settings, seed=3 + index))[0]
        assert replace(alone, log_probability=0.0) == replace(together[index], log_probability=0.0)
        assert alone.log_probability == pytest.approx(together[index].log_probability, abs=1e-3)


@pytest.mark.parametrize("base", [JOINT, BYTES])
def test_constrained_bytes_are_characters_after_any_prompt(student: Student, base: GenerationSettings) -> None:
    raw = generate(student, PROMPTS, replace(base, max_new_bytes=40))
    assert any(count_invalid(r.byte_ids, begun=p, ended=r.ended) for p, r in zip(PROMPTS, raw, strict=True))
    for sampling in (GREEDY, Sampling(), Sampling(temperature=2.0)):
        settings = replace(base, max_new_bytes=40, utf8=Utf8Mode.CONSTRAIN, sampling=sampling)
        for prompt, result in zip(PROMPTS, generate(student, PROMPTS, settings), strict=True):
            assert len(result.byte_ids) == 40 or result.ended
            assert count_invalid(result.byte_ids, begun=prompt, ended=result.ended) == 0


def test_a_constrained_document_ends_between_characters_only(student: Student) -> None:
    """Where ending is all but certain, a character that the prompt leaves open is finished first."""
    from tests.inference.test_generation import Biased

    bias = torch.zeros(512)
    bias[joint_class(BOS_BYTE, 1)] = 50.0
    student.byte_decoder.head = Biased(student.byte_decoder.head, bias)
    settings = replace(JOINT, utf8=Utf8Mode.CONSTRAIN, sampling=GREEDY)
    open_, whole = generate(student, [b"\xf0\x9f", b"a"], settings)
    assert open_.ended and len(open_.byte_ids) == 2 and len((b"\xf0\x9f" + open_.byte_ids).decode()) == 1
    assert whole.ended and whole.byte_ids == b""


def first_stop(text: bytes, stops: tuple[bytes, ...]) -> int:
    """Length of ``text`` in front of the stop text that is complete first, the longest of those."""
    for size in range(1, len(text) + 1):
        lengths = [len(stop) for stop in stops if text[:size].endswith(stop)]
        if lengths:
            return size - max(lengths)
    return len(text)


@pytest.mark.parametrize("base", [JOINT, BYTES])
def test_a_stop_text_ends_a_row_and_is_not_shown(student: Student, base: GenerationSettings) -> None:
    found = 0
    for seed in range(6):
        settings = replace(base, max_new_bytes=24, seed=seed)
        [whole] = generate(student, [b"ab"], settings)
        text = whole.byte_ids
        stops = (text[9:11], text[8:11], text[15:17]) if len(text) > 20 else (b"zz",)
        stopped = replace(settings, stop=stops)
        [result] = generate(student, [b"ab"], stopped)
        cut = first_stop(text, stops)
        assert result.byte_ids == text[:cut] and len(result.bits) == cut
        assert result.stopped_by == (None if cut == len(text) else result.stopped_by)
        if result.stopped_by is not None:
            found += 1
            assert not result.ended and text[cut:].startswith(result.stopped_by)
        assert "".join(stream(student, b"ab", stopped)) == result.byte_ids.decode("utf-8", errors="replace")
    assert found >= 3


def test_what_may_begin_a_stop_text_is_shown_when_it_does_not(student: Student) -> None:
    settings = replace(JOINT, sampling=GREEDY)
    text = generate(student, [b"ab"], settings)[0].byte_ids
    assert len(text) == 16
    never = replace(settings, stop=(text[-4:] + b"no such text",))
    running, shown, seen = Generation(student, [b"ab"], never), bytearray(), []

    def steps() -> Iterator[NewBytes]:
        for step in running:
            yield step
            seen.append(len(shown))

    for byte in new_bytes(steps(), never.stop):
        shown.append(byte)
    assert seen[-1] == 12 and shown == text == running.results()[0].byte_ids


@pytest.mark.parametrize("mode", DechunkMode)
def test_the_papers_prompt_is_one_pass_over_it_with_a_forced_end(
    make_student: Callable[..., Student], mode: DechunkMode
) -> None:
    student = make_student(mode)
    reader = OfficialReader(student, PROMPTS)
    for index, prompt in enumerate(PROMPTS):
        outputs = student(Row(list(prompt), [False] * len(prompt)), RouterDecides())
        assert outputs.bits is not None and outputs.logits is not None
        assert reader.bits[index] == outputs.bits[1:].tolist()
        assert all(reader.bits[index][-1:])
        torch.testing.assert_close(
            reader.log_probabilities[index], outputs.logits[-1].log_softmax(-1), atol=1e-3, rtol=1e-4
        )
    results = generate(student, PROMPTS, replace(JOINT, reading=PromptReading.OFFICIAL, sampling=GREEDY))
    assert [list(result.prompt_bits) for result in results] == reader.bits
    first = reader.log_probabilities[:, :PAD_BYTE].max(-1).values.maximum(reader.log_probabilities[:, 256:511].amax(-1))
    for row, result in enumerate(results):
        if result.byte_ids:
            pair = joint_class(result.byte_ids[0], int(result.bits[0]))
            assert float(reader.log_probabilities[row, pair]) == pytest.approx(float(first[row]))


def test_a_student_in_official_mode_generates_in_the_papers_way_alone(make_student: Callable[..., Student]) -> None:
    student = make_student(DechunkMode.OFFICIAL)
    with pytest.raises(ValueError, match="--scoring official"):
        generate(student, ["a"], JOINT)
    settings = replace(JOINT, reading=PromptReading.OFFICIAL, seed=2)
    together = generate(student, PROMPTS, settings)
    assert any(result.byte_ids for result in together)
    for index, prompt in enumerate(PROMPTS):
        alone = generate(student, [prompt], replace(settings, seed=2 + index))[0]
        assert (alone.byte_ids, alone.bits) == (together[index].byte_ids, together[index].bits)


def test_every_byte_but_two_may_stand_in_a_prompt(student: Student) -> None:
    everything = bytes(byte for byte in range(256) if byte not in (BOS_BYTE, PAD_BYTE))
    for settings in (JOINT, BYTES, replace(JOINT, reading=PromptReading.OFFICIAL, utf8=Utf8Mode.CONSTRAIN)):
        [result] = generate(student, [everything + b"\0"], replace(settings, max_new_bytes=3))
        assert len(result.prompt_bits) == 255 and len(result.byte_ids) <= 3


def limited(student: Student, positions: int) -> Student:
    config = student.backbone.backbone_config
    student.backbone.backbone_config = replace(config, max_position_embeddings=positions)
    return student


@pytest.mark.parametrize("reading", PromptReading)
def test_a_prompt_of_more_chunks_than_positions_is_refused(student: Student, reading: PromptReading) -> None:
    settings = replace(JOINT, reading=reading)
    text = b"any text of many chunks, forty bytes long"
    [result] = generate(student, [text], settings)
    needed = 1 + sum(result.prompt_bits)
    assert generate(limited(student, len(text) + 1), [text], settings)[0].prompt_bits == result.prompt_bits
    assert needed > 5
    with pytest.raises(ValueError, match=r"prompt 2 of 2 is too long: it has 41 bytes.* the 4 positions") as refused:
        generate(limited(student, 4), [b"", text], settings)
    fitting = int(re.findall(r"the first (\d+) of them", str(refused.value))[0])
    if reading is PromptReading.PATHS:  # the paper's way makes one chunk more, of the last byte
        generate(student, [text[:fitting]], settings)
    with pytest.raises(
        ValueError, match=f"the prompt is too long: it has {fitting + 1} bytes, and the first {fitting} "
    ):
        generate(student, [text[: fitting + 1]], settings)


@pytest.mark.parametrize("base", [JOINT, BYTES])
def test_a_row_ends_where_the_backbone_has_no_position_left(student: Student, base: GenerationSettings) -> None:
    def draw() -> list[Generated]:
        return generate(student, [b"ab", b""], replace(base, max_new_bytes=30, seed=1, paths=1))

    whole = draw()
    limited(student, 8)
    for result, free in zip(draw(), whole, strict=True):
        assert free.byte_ids.startswith(result.byte_ids)
        chunks = 1 + sum(result.prompt_bits) + sum(result.bits)
        assert result.is_full == (chunks == 8)
        assert result.is_full or (result.byte_ids, result.ended) == (free.byte_ids, free.ended)
        assert len(result.bits) == len(result.byte_ids)
    assert any(result.is_full for result in draw())
    [prompt_bits] = [result.prompt_bits for result in draw()[:1]]
    limited(student, 1 + sum(prompt_bits))
    assert draw()[0].is_full and draw()[0].byte_ids == b""


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stop": b"end"}, "expected a tuple of bytes"),
        ({"stop": (b"",)}, "none of them empty"),
        ({"stop": ("end",)}, "expected a tuple of bytes"),
        ({"mode": GenerationMode.BYTES, "reading": PromptReading.OFFICIAL}, "joint generation only"),
    ],
)
def test_settings_that_do_not_fit_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GenerationSettings(**fields)  # type: ignore[arg-type]
