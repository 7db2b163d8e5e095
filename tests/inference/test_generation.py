"""Joint generation: against naive loops, single rows, seeds and bad prompts."""

from __future__ import annotations

import pytest
import torch

from megabyte_distill.alphabet import BOS_BYTE, PAD_BYTE, joint_class, split_class
from megabyte_distill.inference.generation import (
    GenerationSettings,
    complete_characters,
    generate,
    stream,
)
from megabyte_distill.inference.prompt_reading import read_prompts
from megabyte_distill.inference.sampling import Sampling
from megabyte_distill.model.student import Student

GREEDY = Sampling(temperature=0)
PROMPTS: list[str | bytes] = ["The king", "", b"half \xe6\x97", "a much longer prompt, é", b"\xff"[:0] + b"x"]


class Row:
    """One document as forward() reads it."""

    def __init__(self, byte_ids: list[int], bits: list[bool]) -> None:
        self.byte_ids = torch.tensor([BOS_BYTE, *byte_ids])
        self.bits = torch.tensor([True, *bits])
        self.is_real = torch.ones_like(self.bits)
        self.cu_seqlens = torch.tensor([0, len(byte_ids) + 1], dtype=torch.int32)
        self.chunk_bucket = 1


def naive_greedy(student: Student, prompt: bytes, prompt_bits: tuple[bool, ...], count: int) -> tuple[bytes, bool]:
    """Re-reads everything for each new byte."""
    byte_ids, bits = list(prompt), list(prompt_bits)
    for _ in range(count):
        logits = student(Row(byte_ids, bits)).logits[-1].clone()
        logits[[joint_class(PAD_BYTE, 0), joint_class(PAD_BYTE, 1)]] = -torch.inf
        byte, bit = split_class(int(logits.argmax()))
        if byte == BOS_BYTE:
            return bytes(byte_ids[len(prompt) :]), True
        byte_ids.append(byte)
        bits.append(bool(bit))
    return bytes(byte_ids[len(prompt) :]), False


def test_greedy_equals_reading_everything_again_for_each_byte(student: Student) -> None:
    results = generate(student, PROMPTS, GenerationSettings(max_new_bytes=24, sampling=GREEDY))
    for prompt, result in zip(PROMPTS, results, strict=True):
        raw = prompt.encode() if isinstance(prompt, str) else prompt
        assert len(result.prompt_bits) == len(raw)
        assert (result.byte_ids, result.ended) == naive_greedy(student, raw, result.prompt_bits, 24)


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(), Sampling(temperature=0.7, top_p=0.9, top_k=50)])
def test_a_ragged_batch_equals_each_prompt_alone(student: Student, sampling: Sampling) -> None:
    together = generate(student, PROMPTS, GenerationSettings(max_new_bytes=24, sampling=sampling, seed=5))
    for index, prompt in enumerate(PROMPTS):
        settings = GenerationSettings(max_new_bytes=24, sampling=sampling, seed=5 + index)
        alone = generate(student, [prompt], settings)[0]
        assert alone.byte_ids == together[index].byte_ids
        assert (alone.bits, alone.prompt_bits) == (together[index].bits, together[index].prompt_bits)
        assert alone.log_probability == pytest.approx(together[index].log_probability, abs=1e-3)


def test_the_seed_decides(student: Student) -> None:
    first, again, other = (
        generate(student, ["a"], GenerationSettings(max_new_bytes=32, seed=seed))[0].byte_ids for seed in (1, 1, 2)
    )
    assert first == again != other


def test_a_prompt_is_read_along_its_likeliest_path_and_nothing_is_forced(student: Student) -> None:
    read = read_prompts(student, [b"some words", b"ab"], 16)
    settings = GenerationSettings(max_new_bytes=0, sampling=GREEDY, paths=16)
    results = generate(student, [b"some words", b"ab"], settings)
    best = read.history(read.log_weights.argmax(-1))
    assert [list(result.prompt_bits) for result in results] == best


def test_padding_is_never_generated_and_bos_ends_a_row(student: Student) -> None:
    with torch.no_grad():
        bias = torch.zeros(512)
        bias[[joint_class(PAD_BYTE, 0), joint_class(PAD_BYTE, 1)]] = 100.0
        bias[joint_class(BOS_BYTE, 1)] = 4.0
        head = student.byte_decoder.head
        student.byte_decoder.head = Biased(head, bias)
    results = generate(student, ["a"] * 8, GenerationSettings(max_new_bytes=64))
    assert all(PAD_BYTE not in result.byte_ids and BOS_BYTE not in result.byte_ids for result in results)
    assert any(result.ended for result in results)
    assert all(result.ended or len(result.byte_ids) == 64 for result in results)
    assert all(len(result.bits) == len(result.byte_ids) for result in results)


class Biased(torch.nn.Module):
    """A head with something added to its logits."""

    def __init__(self, head: torch.nn.Module, bias: torch.Tensor) -> None:
        super().__init__()
        self.head, self.bias = head, bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x) + self.bias


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (b"abc\xfe", "byte 254 \\(0xFE\\) at offset 3"),
        (b"\xffabc", "byte 255 \\(0xFF\\) at offset 0"),
        ("half \ud800 pair", "character 5 of the prompt is U\\+D800"),
    ],
)
def test_a_prompt_that_is_no_text_is_refused(student: Student, prompt: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(student, [prompt])


def test_the_bad_prompt_of_several_is_named(student: Student) -> None:
    with pytest.raises(ValueError, match="prompt 2 of 2 has byte 254"):
        generate(student, ["fine", b"\xfe"])
    with pytest.raises(ValueError, match="no prompts"):
        generate(student, [])
    with pytest.raises(ValueError, match="prompts is one text"):
        generate(student, "one text")


def test_streamed_text_is_the_generated_text(student: Student) -> None:
    settings = GenerationSettings(max_new_bytes=40, seed=3)
    whole = generate(student, ["a"], settings)[0].byte_ids
    assert "".join(stream(student, "a", settings)) == whole.decode("utf-8", errors="replace")


def test_characters_appear_when_they_are_complete() -> None:
    assert list(complete_characters(iter("aé日🙂".encode()))) == ["a", "é", "日", "🙂"]
    assert list(complete_characters(iter(b"\x97\xa5!"), begun="日本".encode()[:4])) != []
    # a prompt that stops inside a character: the character is shown whole once its last byte is there
    assert "".join(complete_characters(iter("日".encode()[1:]), begun="日".encode()[:1])) == "日"
    assert "".join(complete_characters(iter(b"a\xe6"))) == "a\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize("fields", [{"max_new_bytes": -1}, {"paths": 0}, {"seed": -1}])
def test_settings_out_of_range_are_refused(fields: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        GenerationSettings(**fields)  # type: ignore[arg-type]
