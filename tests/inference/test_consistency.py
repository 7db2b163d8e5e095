"""Scores, steps and samples are one distribution: sums over all continuations, prompts cut anywhere, later bytes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.generation import documents
from megabyte_distill.alphabet import END_OF_DOCUMENT_CLASS, JOINT_CLASSES, joint_class
from megabyte_distill.config.model import ByteMixer, DechunkMode
from megabyte_distill.data.packing import PackedRow
from megabyte_distill.inference.generation import GenerationMode, GenerationSettings, generate
from megabyte_distill.inference.scoring import joint_nll, score_paths
from megabyte_distill.inference.utf8 import Utf8Mode
from megabyte_distill.model.student import Given, Student
from tests.inference.test_generation import Biased, Row

TEXT = "It was a bright cold day; 時計が十三時を打った。🙂 Ünïcödé, e\u0301, مرحبا\0end".encode()
CUTS = (0, 1, 5, 9, 27, 28, 30, 52, 60, 61, 62, 63, len(TEXT) - 1)
"""Inside words, and inside characters of two, three and four bytes."""


def tensors(texts: list[bytes]) -> list[Tensor]:
    return [torch.tensor(list(text), dtype=torch.int64) for text in texts]


def of_two_letters(student: Student) -> Student:
    """It writes a, b and the document's end alone."""
    bias = torch.full((JOINT_CLASSES,), -1e4)
    bias[[joint_class(byte, bit) for byte in b"ab" for bit in (0, 1)]] = 0.0
    bias[END_OF_DOCUMENT_CLASS] = 0.5
    student.byte_decoder.head = Biased(student.byte_decoder.head, bias)
    return student


@pytest.mark.parametrize("mode", [DechunkMode.HARD, DechunkMode.CAUSAL])
@pytest.mark.parametrize("paths", [1, 2, 3, 8])
def test_the_filters_probabilities_of_all_continuations_sum_to_one(
    make_student: Callable[..., Student], mode: DechunkMode, paths: int
) -> None:
    """However many paths are pruned; with eight none is, and the scores themselves sum to one."""
    student = of_two_letters(make_student(mode, ByteMixer.MAMBA2))
    longer = [bytes(text) for text in itertools.product(b"ab", repeat=3)]
    ended = [bytes(text) for size in range(3) for text in itertools.product(b"ab", repeat=size)]
    score = score_paths(student, tensors(longer + ended), paths=paths)
    ends = (2.0 ** -(score.filter_bits + score.end_bits))[len(longer) :].sum()
    assert float(ends) > 0.01
    assert float((2.0**-score.filter_bits)[: len(longer)].sum() + ends) == pytest.approx(1.0, abs=1e-5)
    # what is pruned is lost to the score, not to the filter
    lost = score.bits - score.filter_bits
    assert float(lost.min()) > -1e-4
    assert (float(lost.max()) > 0.01) == (paths < 8)


@pytest.mark.parametrize("utf8", Utf8Mode)
def test_a_continuation_of_bytes_has_the_probability_that_scoring_gives_it(student: Student, utf8: Utf8Mode) -> None:
    prompts = [TEXT[:cut] for cut in CUTS]
    settings = GenerationSettings(max_new_bytes=8, mode=GenerationMode.BYTES, utf8=utf8, seed=1)
    results = generate(student, list(prompts), settings)
    before = score_paths(student, tensors(prompts))
    after = score_paths(student, tensors([p + r.byte_ids for p, r in zip(prompts, results, strict=True)]))
    for index, result in enumerate(results):
        bits = float(after.filter_bits[index] - before.filter_bits[index] + result.ended * after.end_bits[index])
        assert -result.log_probability / math.log(2) == pytest.approx(bits, abs=1e-4, rel=0)


def test_a_continuation_of_pairs_has_the_probability_that_one_pass_gives_it(student: Student) -> None:
    prompts = [TEXT[:cut] for cut in CUTS]
    for prompt, result in zip(
        prompts, generate(student, list(prompts), GenerationSettings(max_new_bytes=8)), strict=True
    ):
        text, bits = list(prompt + result.byte_ids), [*result.prompt_bits, *result.bits]
        row = Row(text, bits)
        logs = student(row, Given(row.bits)).logits.double().log_softmax(-1)
        classes = [joint_class(byte, int(bit)) for byte, bit in zip(text, bits, strict=True)]
        classes += [END_OF_DOCUMENT_CLASS] * result.ended
        total = sum(float(logs[place, classes[place]]) for place in range(len(prompt), len(classes)))
        assert result.log_probability == pytest.approx(total, abs=1e-4, rel=0)


def read_again(student: Student, text: bytes, paths: int) -> tuple[list[float], list[float]]:
    """(under the causal filter, along the paths kept) bits behind each byte and before any, [L + 1].

    The K heaviest segmentations are kept as lists of bits, and each is read whole again for each byte.
    """
    kept: list[tuple[float, tuple[bool, ...]]] = [(0.0, ())]
    filtered, summed = [0.0], [0.0]
    for place, byte in enumerate(text):
        heirs = []
        for weight, bits in kept:
            logs = student(Row(list(text[:place]), list(bits))).logits[-1].double().log_softmax(-1)
            heirs += [(weight + float(logs[joint_class(byte, int(bit))]), (*bits, bit)) for bit in (False, True)]
        before, after = (torch.tensor([weight for weight, _ in some]).double().logsumexp(0) for some in (kept, heirs))
        filtered.append(filtered[-1] + float(before - after) / math.log(2))
        kept = sorted(heirs, reverse=True)[:paths]
        summed.append(-float(torch.tensor([weight for weight, _ in kept]).double().logsumexp(0)) / math.log(2))
    return filtered, summed


OF_THE_EXAMPLE = next(documents("heldout", 1))[200:240]


@pytest.mark.parametrize(
    ("mode", "text", "cuts"),
    [
        pytest.param(DechunkMode.HARD, TEXT, CUTS, id="hard, many scripts"),
        pytest.param(DechunkMode.HARD, OF_THE_EXAMPLE, range(0, 40, 7), id="hard, the example's"),
        pytest.param(DechunkMode.CAUSAL, OF_THE_EXAMPLE, range(0, 40, 7), id="causal, the example's"),
    ],
)
@torch.no_grad()
def test_a_text_costs_what_reading_it_again_for_each_byte_says_wherever_it_is_cut(
    make_student: Callable[..., Student], mode: DechunkMode, text: bytes, cuts: Sequence[int]
) -> None:
    student = make_student(mode)
    filtered, summed = read_again(student, text, paths=4)
    sizes = [*cuts, len(text)]
    score = score_paths(student, tensors([text[:size] for size in sizes]), paths=4)
    assert score.filter_bits.tolist() == pytest.approx([filtered[size] for size in sizes], abs=1e-4, rel=0)
    assert score.bits.tolist() == pytest.approx([summed[size] for size in sizes], abs=1e-4, rel=0)
    assert summed[-1] > filtered[-1] + 0.1, "nothing was pruned"


@pytest.mark.parametrize("mode", [DechunkMode.HARD, DechunkMode.CAUSAL])
def test_with_bits_given_no_later_byte_changes_a_score(
    make_student: Callable[..., Student], rows: list[PackedRow], mode: DechunkMode
) -> None:
    student, row = make_student(mode), rows[0]
    before = joint_nll(student(row).logits, row.bits, row)
    place = int(row.cu_seqlens[1]) // 2
    for byte in (0, ord("z"), 0xE3):
        changed: Any = SimpleNamespace(trained=row.trained, **{name: getattr(row, name) for name in row.__slots__})
        changed.byte_ids = row.byte_ids.clone()
        changed.byte_ids[place] = byte
        after = joint_nll(student(changed).logits, row.bits, changed)
        assert torch.equal(after[: place - 1], before[: place - 1])
        assert not torch.equal(after[place - 1 :], before[place - 1 :])


def test_the_encoder_runs_once_for_all_paths_and_nothing_before_a_byte_runs_again(student: Student) -> None:
    text, paths = tensors([TEXT[:40], TEXT[:25]]), 4
    counts = dict.fromkeys(("encoder", "decoder", "backbone"), 0)

    def counting(name: str, step: Callable[..., Any]) -> Callable[..., Any]:
        def counted(first: Tensor, *others: Any) -> Any:
            counts[name] += first.shape[0]
            return step(first, *others)

        return counted

    student.byte_encoder.step = counting("encoder", student.byte_encoder.step)  # type: ignore[method-assign]
    student.byte_decoder.step = counting("decoder", student.byte_decoder.step)  # type: ignore[method-assign]
    student.backbone.step = counting("backbone", student.backbone.step)
    score_paths(student, text, paths=paths)
    assert counts["encoder"] == 2 + 40 + 25
    assert counts["decoder"] == 2 + paths * (40 + 25)
    assert counts["backbone"] <= 2 + paths * (40 + 25)
