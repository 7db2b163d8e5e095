"""Stages on rows whose chunks are several tokens: what the student reads, what the teacher reads, and the losses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from megabyte_distill.alphabet import BOS_BYTE
from megabyte_distill.config.stage import ByteTargets, StageConfig
from megabyte_distill.curriculum.boundary_learning import LOSS as BOUNDARY_LOSS
from megabyte_distill.curriculum.boundary_learning import BoundaryLearning
from megabyte_distill.curriculum.byte_sft import BYTE_LOSS, MEASURE, ROUTER_LOSS, ByteSft
from megabyte_distill.data.chunk_merging import merge_row
from megabyte_distill.data.packing import PackedRow
from megabyte_distill.model.student import Parts, Student
from megabyte_distill.objectives.boundary import (
    BYTES_PER_CHUNK,
    ROUTER_BYTES_PER_CHUNK,
    boundary_bce,
    boundary_positions,
)
from megabyte_distill.objectives.joint_ce import joint_bits_pair, joint_nll
from megabyte_distill.objectives.truncated_targets import truncated
from tests.curriculum.test_byte_targets import TABLE, objective, targets_of_teacher
from tests.tiny_student import padded_row, tiny_student

pytestmark = pytest.mark.usefixtures("world")


@pytest.fixture
def student() -> Student:
    torch.manual_seed(0)
    return tiny_student()


@pytest.fixture
def tokens() -> PackedRow:
    return padded_row()


@pytest.fixture
def row(tokens: PackedRow) -> PackedRow:
    merged = merge_row(tokens, 2.5)
    assert 2 < int(merged.bits.sum()) < int(tokens.bits.sum()) - 2
    return merged


def log_pairs(student: Student, row: PackedRow) -> Tensor:
    """[P, 2, 256] log-probabilities under the row's own chunks."""
    with torch.no_grad():
        return student(row).logits.log_softmax(-1).view(-1, 2, 256)


def test_the_student_has_fewer_chunks_and_the_teacher_all_its_tokens(
    student: Student, tokens: PackedRow, row: PackedRow
) -> None:
    outputs = student(row)
    chunks = int(row.bits.sum())
    assert outputs.layout.ends[:chunks].tolist() == row.bits.nonzero()[:, 0].tolist()
    assert outputs.hidden.shape[0] == -(-chunks // row.chunk_bucket) * row.chunk_bucket
    assert torch.equal(targets_of_teacher(row).distribution, targets_of_teacher(tokens).distribution)


def test_hard_labels_are_the_merged_bits(student: Student, row: PackedRow) -> None:
    hard = objective(ByteTargets.HARD)
    loss = hard.losses(student, row)[BYTE_LOSS]
    expected = -log_pairs(student, row).flatten(1).gather(1, row.labels[:, None])[row.is_real].sum()
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-5, atol=1e-4)
    size, chunks = hard.measures()[BYTES_PER_CHUNK]
    text = row.is_real & (row.byte_ids < 254)
    assert (int(size), int(chunks)) == (int(text.sum()), int((row.bits & text).sum()))


def test_exact_targets_are_the_teachers_bytes_and_the_merged_bit(student: Student, row: PackedRow) -> None:
    exact = objective(ByteTargets.EXACT)
    loss = exact.losses(student, row)[BYTE_LOSS]
    log_p = log_pairs(student, row)
    of_byte = log_p.logsumexp(1)
    target = targets_of_teacher(row).distribution.view(-1, 2, 256).sum(1)
    target[row.token_ends & ~row.bits, BOS_BYTE] = 0.0  # the text goes on
    target /= target.sum(-1, keepdim=True)
    assert row.forced_ends is not None and row.forced_ends.any()
    target[row.forced_ends] = one_hot(row.labels[row.forced_ends] % 256, 256).float()
    bytes_ce = -(target * of_byte).sum(-1)
    byte = row.labels[:, None] % 256
    bit_nll = (of_byte.gather(1, byte) - log_p.flatten(1).gather(1, row.labels[:, None]))[:, 0]
    torch.testing.assert_close(loss.detach(), (bytes_ce + bit_nll)[row.is_real].sum(), rtol=1e-5, atol=1e-4)
    with torch.no_grad():
        measured = joint_bits_pair(joint_nll(student(row).logits, row), row)
    torch.testing.assert_close(exact.measures()[MEASURE][0], measured[0])


def test_a_mixture_weighs_both_with_gradients(student: Student, row: PackedRow) -> None:
    losses: list[float] = []
    gradients: list[Tensor] = []
    for chosen in (objective(ByteTargets.HARD), objective(ByteTargets.EXACT), objective(ByteTargets.MIXED, alpha=0.25)):
        student.zero_grad()
        loss = chosen.losses(student, row)[BYTE_LOSS]
        loss.backward()
        losses.append(float(loss))
        gradients.append(student.byte_decoder.head.weight.grad.clone())
    assert losses[2] == pytest.approx(0.75 * losses[0] + 0.25 * losses[1], rel=1e-5)
    torch.testing.assert_close(gradients[2], 0.75 * gradients[0] + 0.25 * gradients[1], rtol=1e-4, atol=1e-4)
    assert (gradients[0] - gradients[1]).abs().max() > 0.1


def test_targets_from_a_cache_are_the_teachers(student: Student, row: PackedRow) -> None:
    online = float(objective(ByteTargets.EXACT).losses(student, row)[BYTE_LOSS])
    stored = replace(row, stored=truncated(targets_of_teacher(row).distribution, 512))
    config = replace(StageConfig(), byte_targets=ByteTargets.EXACT, logits_load_dir="somewhere")
    cached = ByteSft(config, None, TABLE, trains_router=False)
    assert float(cached.losses(student, stored)[BYTE_LOSS]) == pytest.approx(online, rel=1e-4)
    few = replace(row, stored=truncated(targets_of_teacher(row).distribution, 4))
    assert float(cached.losses(student, few)[BYTE_LOSS]) == pytest.approx(online, rel=0.1)


def test_the_router_learns_the_merged_ends(student: Student, row: PackedRow) -> None:
    p = student(row, parts=Parts.ENCODER | Parts.ROUTER).p.detach()
    expected = boundary_bce(p, row.bits)[boundary_positions(row)].sum()
    alone = BoundaryLearning(StageConfig(), None)
    torch.testing.assert_close(alone.losses(student, row)[BOUNDARY_LOSS].detach(), expected)
    beside = objective(ByteTargets.EXACT, trains_router=True)
    torch.testing.assert_close(beside.losses(student, row)[ROUTER_LOSS].detach(), expected)
    for found in (alone.measures(), beside.measures()):
        size, chunks = found[ROUTER_BYTES_PER_CHUNK]
        assert size == found[BYTES_PER_CHUNK][0] and 0 < int(chunks) <= int(size)


def test_rows_as_they_are_have_the_loss_and_measures_they_had(student: Student, tokens: PackedRow) -> None:
    exact = objective(ByteTargets.EXACT)
    loss = exact.losses(student, merge_row(tokens, None))[BYTE_LOSS].detach()
    expected = -(targets_of_teacher(tokens).distribution * log_pairs(student, tokens).flatten(1))[tokens.is_real].sum()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-4)
    assert BYTES_PER_CHUNK not in exact.measures()
