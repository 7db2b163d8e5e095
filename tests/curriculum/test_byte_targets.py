"""What 2a and 2b are trained on: the text, the teacher's exact distribution, or both."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megabyte_distill.config.stage import BoundarySource, ByteTargets, StageConfig, TargetsFrom
from megabyte_distill.curriculum.byte_sft import BYTE_LOSS, EXCLUDED, MEASURE, REPLACED, ByteSft
from megabyte_distill.curriculum.stage import TeacherNeed
from megabyte_distill.curriculum.stages import STAGES, resolved_stages
from megabyte_distill.data.mock import MockDataset
from megabyte_distill.data.packing import PackedRow
from megabyte_distill.model.backbone import Backbone
from megabyte_distill.model.student import Gold, Parts, Student
from megabyte_distill.objectives.byte_tree import ByteTree
from megabyte_distill.objectives.exact_targets import ExactTargets, exact_targets
from tests.tiny_student import VOCAB_SIZE, padded_row, tiny_backbone, tiny_student

pytestmark = pytest.mark.usefixtures("world")

TABLE = MockDataset(VOCAB_SIZE, seed=0).table


def objective(
    targets: ByteTargets, *, alpha: float = 0.5, temperature: float = 1.0, trains_router: bool = False
) -> ByteSft:
    torch.manual_seed(3)
    config = replace(StageConfig(), byte_targets=targets, kd_loss_alpha=alpha, kd_temperature=temperature)
    return ByteSft(config, tiny_backbone().requires_grad_(False), TABLE, trains_router=trains_router)


@torch.no_grad()
def targets_of(states: Tensor, model: Backbone, row: PackedRow) -> ExactTargets:
    """The exact targets of a token model's states [M, E] on a row's tokens."""
    return exact_targets(
        ByteTree.of(TABLE),
        states,
        head=model.own_logits,
        byte_ids=row.byte_ids,
        bits=row.token_ends,
        labels=row.labels,
        wanted=row.is_real,
    )


@torch.no_grad()
def targets_of_teacher(row: PackedRow) -> ExactTargets:
    """Those of the teacher of :func:`objective`."""
    torch.manual_seed(3)
    teacher = tiny_backbone()
    return targets_of(teacher(teacher.embed(row.tokens), row.cu_chunks), teacher, row)


@pytest.fixture
def student() -> Student:
    torch.manual_seed(0)
    return tiny_student()


@pytest.fixture
def row() -> PackedRow:
    return padded_row()


@pytest.mark.parametrize("temperature", [1.0, 0.7, 4.0])
def test_the_exact_loss_is_the_cross_entropy_with_the_teachers_distribution(
    student: Student, row: PackedRow, temperature: float
) -> None:
    exact = objective(ByteTargets.EXACT, temperature=temperature)
    loss = exact.losses(student, row)[BYTE_LOSS]
    target = targets_of_teacher(row)
    with torch.no_grad():
        log_p = (student(row).logits / temperature).log_softmax(-1)
        # by way of logits, as Hinton writes it
        wanted = (target.distribution[row.is_real].double().log() / temperature).softmax(-1)
    expected = -(temperature**2) * (wanted * log_p[row.is_real]).sum().float()
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-5, atol=1e-4)
    assert exact.measures()[REPLACED][0] == target.replaced
    assert exact.measures()[EXCLUDED] == (target.excluded, int(row.token_mask.sum()))


@pytest.mark.parametrize(
    ("changes", "behind", "whose"),
    [
        ({}, ["1a", "1b", "1c"], TargetsFrom.STUDENT),
        ({}, ["1b"], TargetsFrom.TEACHER),
        ({}, [], TargetsFrom.TEACHER),
        ({}, ["1a", "1c"], TargetsFrom.TEACHER),
        ({}, ["1a", "1b", "1c", "2a", "2b"], TargetsFrom.TEACHER),
        ({}, ["1a", "1b", "1c", "3a"], TargetsFrom.TEACHER),
        ({}, ["1a", "1b", "1c", "2a", "2b", "1a", "1b"], TargetsFrom.STUDENT),
        ({"boundary_source": BoundarySource.ROUTER}, ["1a", "1b", "1c"], TargetsFrom.TEACHER),
        ({"target_bytes_per_chunk": 9.0}, ["1a", "1b", "1c"], TargetsFrom.TEACHER),
        ({"exact_targets_from": TargetsFrom.TEACHER}, ["1a", "1b", "1c"], TargetsFrom.TEACHER),
        ({"exact_targets_from": TargetsFrom.STUDENT}, [], TargetsFrom.STUDENT),
    ],
)
def test_auto_takes_the_students_backbone_where_it_is_the_token_model_that_1a_and_1b_made(
    changes: dict[str, Any], behind: list[str], whose: TargetsFrom
) -> None:
    config = replace(StageConfig(byte_targets=ByteTargets.EXACT), **changes)
    found = resolved_stages({"2a": config}, behind)["2a"]
    assert found == replace(config, exact_targets_from=whose)
    needs = {TargetsFrom.STUDENT: TeacherNeed.NONE, TargetsFrom.TEACHER: TeacherNeed.FROZEN}
    assert STAGES["2a"].teacher(found) is needs[whose]
    assert STAGES["2b"].teacher(found) is TeacherNeed.FROZEN


@pytest.mark.parametrize(("order", "whose"), [("1a,1b,1c,2a", TargetsFrom.STUDENT), ("1a,1c,2a", TargetsFrom.TEACHER)])
def test_stages_of_one_run_stand_behind_each_other(order: str, whose: TargetsFrom) -> None:
    stages = dict.fromkeys(order.split(","), StageConfig(byte_targets=ByteTargets.EXACT))
    assert resolved_stages(stages)["2a"].exact_targets_from is whose


def test_the_students_own_targets_are_of_its_backbone_on_its_chunks_and_get_no_gradient(
    student: Student, row: PackedRow
) -> None:
    config = replace(StageConfig(), byte_targets=ByteTargets.EXACT, exact_targets_from=TargetsFrom.STUDENT)
    own = ByteSft(config, None, TABLE, trains_router=False)
    own.losses(student, row)[BYTE_LOSS].backward()
    found = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()
    outputs = student(row, Gold(), Parts.ENCODER | Parts.BACKBONE | Parts.DECODER)
    target = targets_of(outputs.hidden, student.backbone, row).distribution
    (-target * outputs.logits.log_softmax(-1))[row.is_real].sum().backward()
    assert not any(name.startswith("backbone.embedding") for name in found), "the tied head only says what is wanted"
    for name, grad in found.items():
        torch.testing.assert_close(
            grad, student.get_parameter(name).grad, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_a_mixture_weighs_both(student: Student, row: PackedRow) -> None:
    hard, exact = (float(objective(t).losses(student, row)[BYTE_LOSS]) for t in (ByteTargets.HARD, ByteTargets.EXACT))
    mixed = float(objective(ByteTargets.MIXED, alpha=0.25).losses(student, row)[BYTE_LOSS])
    assert abs(hard - exact) > 1.0
    assert mixed == pytest.approx(0.25 * exact + 0.75 * hard, rel=1e-5)
    warm, mild = (
        float(objective(targets, alpha=0.25, temperature=2.0).losses(student, row)[BYTE_LOSS])
        for targets in (ByteTargets.EXACT, ByteTargets.MIXED)
    )
    assert mild == pytest.approx(0.25 * warm + 0.75 * hard, rel=1e-5), "the text's part stays at temperature 1"


@pytest.mark.parametrize("targets", ByteTargets)
@pytest.mark.parametrize(("trains_router", "temperature"), [(False, 1.0), (True, 1.0), (True, 3.0)])
def test_held_out_rows_and_the_measure_are_about_the_text(
    student: Student, row: PackedRow, targets: ByteTargets, trains_router: bool, temperature: float
) -> None:
    plain, other = (
        objective(t, temperature=temperature, trains_router=trains_router) for t in (ByteTargets.HARD, targets)
    )
    for model in (student.train(), student.eval()):
        expected, found = plain.losses(model, row), other.losses(model, row)
        assert torch.equal(plain.measures()[MEASURE][0], other.measures()[MEASURE][0])
        if not model.training:
            assert {n: float(v) for n, v in expected.items()} == {n: float(v) for n, v in found.items()}
            assert REPLACED not in other.measures()


def test_the_gradient_of_the_exact_loss_is_softmax_minus_target(student: Student, row: PackedRow) -> None:
    """Seen at the head's bias-free weight: d loss / d W = (softmax − target)ᵀ · state."""
    exact = objective(ByteTargets.EXACT)
    seen: list[torch.Tensor] = []
    student.byte_decoder.head.register_full_backward_hook(lambda module, grad_in, grad_out: seen.append(grad_out[0]))
    exact.losses(student, row)[BYTE_LOSS].backward()
    gradient = seen[0].reshape(-1, 512)
    assert torch.allclose(gradient[row.is_real].sum(-1), torch.zeros(int(row.is_real.sum())), atol=1e-5)
    assert not gradient[~row.is_real].any() and gradient[row.is_real].abs().sum() > 1
    assert all(parameter.grad is None for parameter in exact._exact.teacher.parameters())
