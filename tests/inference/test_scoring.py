"""Scores: one pass against steps, paths against all segmentations, the accounting of segments."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megabyte_distill.alphabet import BOS_BYTE, END_OF_DOCUMENT_CLASS, joint_class
from megabyte_distill.config.model import ByteMixer, DechunkMode
from megabyte_distill.data.packing import PackedRow
from megabyte_distill.data.text_mask import text_positions
from megabyte_distill.inference.bit_paths import BitPaths
from megabyte_distill.inference.scoring import (
    joint_nll,
    labels_under,
    score_official,
    score_paths,
    score_row,
    score_tokens,
    segment_texts,
)
from megabyte_distill.model.backbone import Backbone
from megabyte_distill.model.student import Gold, RouterDecides, Student


def step_bits(student: Student, text: Tensor, bits: Tensor) -> tuple[Tensor, Tensor]:
    """Code length in bits [N] of N copies of a text [L] under bits [N, L], by step(); and that of the ending."""
    count = bits.shape[0]
    state = student.init_state(count)
    start = torch.full((count,), BOS_BYTE)
    logits = student.step(start, torch.ones(count, dtype=torch.bool), state)
    total = torch.zeros(count, dtype=torch.float64)
    for position, byte in enumerate(text):
        bit = bits[:, position]
        total += logits.double().log_softmax(-1).gather(1, joint_class(byte, bit.long())[:, None])[:, 0]
        logits = student.step(byte.expand(count), bit, state)
    end = logits.double().log_softmax(-1)[:, END_OF_DOCUMENT_CLASS]
    return -total / math.log(2), -end / math.log(2)


def every_segmentation(length: int) -> Tensor:
    return torch.tensor(list(itertools.product((False, True), repeat=length)))


@pytest.mark.parametrize("mixer", ByteMixer)
@pytest.mark.parametrize("mode", [DechunkMode.HARD, DechunkMode.CAUSAL])
def test_one_pass_equals_the_sum_over_steps(
    make_student: Callable[..., Student], rows: list[PackedRow], mode: DechunkMode, mixer: ByteMixer
) -> None:
    student = make_student(mode, mixer)
    row = next(row for row in rows if len(row.documents) > 1)
    edges = row.cu_seqlens.tolist()
    for boundaries in (Gold(), RouterDecides()):
        bits = student(row, boundaries).bits
        score = score_row(student, row, boundaries)
        for segment, text in enumerate(segment_texts(row)):
            given = bits[None, edges[segment] + 1 : edges[segment + 1]]
            assert float(step_bits(student, text, given)[0]) == pytest.approx(float(score.bits[segment]), rel=1e-4)


def test_document_ends_are_reported_apart(student: Student, rows: list[PackedRow]) -> None:
    row = next(row for row in rows if bool((row.labels == END_OF_DOCUMENT_CLASS).any()))
    score = score_row(student, row)
    assert score.ends == int((row.labels == END_OF_DOCUMENT_CLASS).sum())
    edges, expected = row.cu_seqlens.tolist(), 0.0
    for segment, text in enumerate(segment_texts(row)):
        if row.labels[edges[segment + 1] - 1] == END_OF_DOCUMENT_CLASS:
            expected += float(step_bits(student, text, row.bits[None, edges[segment] + 1 : edges[segment + 1]])[1])
    assert score.end_bits == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("mode", DechunkMode)
def test_the_papers_score_takes_the_likelier_bit_under_the_routers_boundaries(
    make_student: Callable[..., Student], rows: list[PackedRow], mode: DechunkMode
) -> None:
    student, row = make_student(mode), next(row for row in rows if len(row.documents) > 1)
    score = score_official(student, row)
    probabilities = student(row, RouterDecides()).logits.softmax(-1)
    edges = row.cu_seqlens.tolist()
    for segment, text in enumerate(segment_texts(row)):
        expected = 0.0
        for position, byte in enumerate(text.tolist(), start=edges[segment]):
            expected -= math.log2(max(float(probabilities[position, byte + 256 * bit]) for bit in (0, 1)))
        assert float(score.bits[segment]) == pytest.approx(expected, rel=1e-4)
    assert float(score.bits.sum()) < float(score_row(student, row, RouterDecides()).bits.sum())
    assert torch.equal(score.bytes, score_row(student, row).bytes)


def test_labels_are_made_of_the_bits_in_force(rows: list[PackedRow]) -> None:
    for row in rows:
        assert torch.equal(labels_under(row.bits, row), row.labels)
        labels = labels_under(~row.bits, row)
        text = text_positions(row)
        assert torch.equal(labels[~text], row.labels[~text])
        # the same byte, the other bit
        assert torch.equal(labels[text] % 256, row.labels[text] % 256)
        assert torch.equal(labels[text] // 256, 1 - row.labels[text] // 256)


def test_teacher_and_student_are_divided_by_the_same_bytes(
    student: Student, teacher: Backbone, rows: list[PackedRow]
) -> None:
    for row in rows:
        joint, tokens = score_row(student, row), score_tokens(teacher, row)
        assert torch.equal(joint.bytes, tokens.bytes)
        assert int(joint.bytes.sum()) == int(text_positions(row).sum())
        assert joint.ends == tokens.ends


def test_token_score_equals_each_document_alone(teacher: Backbone, rows: list[PackedRow]) -> None:
    row = next(row for row in rows if len(row.documents) > 1)
    score = score_tokens(teacher, row)
    edges = row.cu_chunks.tolist()
    for segment in range(len(row.documents)):
        first, last = edges[segment], edges[segment + 1]
        tokens = row.tokens[first:last]
        logits = teacher.logits(teacher(teacher.embed(tokens), torch.tensor([0, last - first], dtype=torch.int32)))
        nll = torch.nn.functional.cross_entropy(logits[:-1], tokens[1:], reduction="sum")
        assert float(score.bits[segment]) == pytest.approx(float(nll) / math.log(2), rel=1e-4)


@pytest.mark.parametrize("mode", [DechunkMode.HARD, DechunkMode.CAUSAL])
def test_enough_paths_equal_the_sum_over_all_segmentations(
    make_student: Callable[..., Student], mode: DechunkMode
) -> None:
    student = make_student(mode, ByteMixer.MAMBA2)
    text = torch.tensor(list(b"abbac"))
    bits, ends = step_bits(student, text, every_segmentation(5))
    score = score_paths(student, [text], paths=32)
    exact = -torch.logsumexp(-bits * math.log(2), 0) / math.log(2)
    assert float(score.bits) == pytest.approx(float(exact), rel=1e-5)
    assert float(score.filter_bits) == pytest.approx(float(exact), rel=1e-5)
    with_end = -torch.logsumexp(-(bits + ends) * math.log(2), 0) / math.log(2)
    assert float(score.bits + score.end_bits) == pytest.approx(float(with_end), rel=1e-5)


def test_more_paths_tighten_the_bound(student: Student) -> None:
    text = torch.tensor(list(b"a longer text, 30 bytes of it."))
    values = [float(score_paths(student, [text], paths=paths).bits) for paths in (1, 2, 4, 8, 16, 64)]
    # a beam may lose a late winner, so the bound need not fall at every single step; here it does
    assert values == sorted(values, reverse=True) and values[0] > values[-1] + 0.5
    assert float(score_paths(student, [text], paths=4).filter_bits) <= values[2]


def test_no_number_of_paths_beats_the_exact_sum(student: Student) -> None:
    text = torch.tensor(list(b"sevenby"))
    exact = float(score_paths(student, [text], paths=128).bits)
    for paths in range(1, 20):
        assert float(score_paths(student, [text], paths=paths).bits) >= exact - 1e-4


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_texts_of_any_lengths_score_as_alone(student: Student, batch: int) -> None:
    texts = [torch.tensor(list(text), dtype=torch.int64) for text in (b"abc", b"", b"a longer one", b"abcabcabc", b"x")]
    together = score_paths(student, texts, paths=3, batch=batch)
    for index, text in enumerate(texts):
        alone = score_paths(student, [text], paths=3)
        for name in ("bits", "filter_bits", "end_bits"):
            assert float(getattr(together, name)[index]) == pytest.approx(float(getattr(alone, name)), abs=1e-3)
    assert float(together.bits[1]) == 0.0


def test_the_causal_byte_filter_sums_to_one(student: Student) -> None:
    running = BitPaths(student, 3, 4)
    for byte in b"any text":
        assert running.next_byte_log_probabilities().exp().sum(-1).tolist() == pytest.approx([1.0] * 3, abs=1e-5)
        running.advance(torch.tensor([byte, byte, byte + 1]))


def test_paths_stay_distinct_and_their_weights_are_their_scores(student: Student) -> None:
    text = torch.tensor(list(b"some text"))
    running = BitPaths(student, 1, 6, keep_history=True)
    for byte in text:
        running.advance(byte[None])
    histories = [tuple(running.history(torch.tensor([path]))[0]) for path in range(6)]
    assert len(set(histories)) == 6
    bits, _ = step_bits(student, text, torch.tensor(histories))
    assert (-running.log_weights[0] / math.log(2)).tolist() == pytest.approx(bits.tolist(), rel=1e-4)


def test_scores_do_not_depend_on_later_bytes(student: Student, monkeypatch: pytest.MonkeyPatch) -> None:
    """What each byte costs in a batch of texts that begin alike is what it costs where the text is cut behind it."""
    start = "the same 日".encode()
    texts = [torch.tensor(list(start + rest)) for rest in (b"! and more", b"\xff\0B, longer still", b"", b"A")]
    costs: list[Tensor] = []
    sums: list[Tensor] = []
    cost, advance = BitPaths.log_probability_of, BitPaths.advance

    def costing(paths: BitPaths, byte_ids: Tensor) -> Tensor:
        costs.append(cost(paths, byte_ids))
        return costs[-1]

    def advancing(paths: BitPaths, byte_ids: Tensor) -> None:
        advance(paths, byte_ids)
        sums.append(paths.log_probability())

    with monkeypatch.context() as patch:
        patch.setattr(BitPaths, "log_probability_of", costing)
        patch.setattr(BitPaths, "advance", advancing)
        score_paths(student, texts, paths=4)
    cut = [score_paths(student, [texts[0][: size + 1]], paths=4) for size in range(len(start))]
    whole = torch.stack(costs[: len(start)]).cumsum(0) / -math.log(2), torch.stack(sums[: len(start)]) / -math.log(2)
    for found, alone in zip(whole, ([one.filter_bits for one in cut], [one.bits for one in cut]), strict=True):
        torch.testing.assert_close(found, torch.stack(alone).expand(-1, len(texts)), rtol=0, atol=1e-4)
    # the bytes that differ do cost differently
    assert len({round(float(value), 3) for value in costs[len(start)]}) == costs[len(start)].shape[0] == 3


def test_given_bits_are_input_and_label_alike(student: Student, rows: list[PackedRow]) -> None:
    """The router's score is the joint score of its own bits, not gold labels under its bits."""
    row = rows[0]
    outputs = student(row, RouterDecides())
    assert not torch.equal(outputs.bits & row.is_real, row.bits & row.is_real)
    nll = joint_nll(outputs.logits, outputs.bits, row)
    first = row.cu_seqlens[0]
    wanted = joint_class(int(row.byte_ids[first + 1]), int(outputs.bits[first + 1]))
    assert float(nll[first]) == pytest.approx(-float(outputs.logits[first].log_softmax(-1)[wanted]), rel=1e-5)


@pytest.mark.parametrize(("rows_", "paths"), [(0, 1), (1, 0)])
def test_no_rows_or_no_paths_is_refused(student: Student, rows_: int, paths: int) -> None:
    with pytest.raises(ValueError, match="at least one of each"):
        BitPaths(student, rows_, paths)


def test_official_mode_cannot_be_scored_along_paths(make_student: Callable[..., Student]) -> None:
    with pytest.raises(ValueError, match="cannot step dechunk mode official"):
        score_paths(make_student(DechunkMode.OFFICIAL), [torch.tensor([97])])
