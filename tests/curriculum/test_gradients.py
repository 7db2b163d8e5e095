"""Each stage trains what docs/training.md says and nothing else: by name, and by where gradients arrive."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megabyte_distill.config.model import ByteMixer, DechunkMode
from megabyte_distill.config.stage import BoundarySource, StageConfig
from megabyte_distill.curriculum.stage import TeacherNeed
from megabyte_distill.curriculum.stages import STAGES
from megabyte_distill.model.backbone import Backbone
from megabyte_distill.model.student import Student, set_trainable
from megabyte_distill.objectives.objective import Objective
from tests.tiny_student import BACKBONE, assert_same, gradients, random_rows, tiny_backbone, tiny_student

pytestmark = pytest.mark.usefixtures("world")

BYTE_SIDE = {"byte_encoder", "router", "byte_decoder"}
CONFIG = StageConfig()
CASES = [(name, False) for name in STAGES] + [("1b", True), ("2b", True), ("3a", True)]
"""(stage, freeze_backbone): the setting exists in 1b, 2b and 3a."""
OFFICIAL = replace(CONFIG, boundary_source=BoundarySource.ROUTER, align_layers=1)


def teacher_for(name: str, config: StageConfig, student: Student) -> Backbone | None:
    """As a run chooses it: the student's own backbone where this stage leaves it alone, else a frozen copy."""
    need = STAGES[name].teacher(config)
    if need is TeacherNeed.NONE:
        return None
    if need is TeacherNeed.BEGINNING or config.freeze_backbone:
        return student.backbone  # type: ignore[return-value]
    teacher = tiny_backbone(tied_embeddings=student.backbone.backbone_config.tied_embeddings)
    return teacher.requires_grad_(False)


def stage_gradients(name: str, config: StageConfig, student: Student) -> dict[str, torch.Tensor]:
    stage = STAGES[name]
    set_trainable(student, stage.trains(config, student.backbone.backbone_config))
    objective: Objective = stage.objective(config, teacher_for(name, config, student), None)
    rows = random_rows(4, row_bytes=96)

    def loss() -> torch.Tensor:
        terms = [objective.weights[k] * v for row in rows for k, v in objective.losses(student, row).items()]
        return torch.stack(terms).sum()

    return gradients(student, loss)


def trainable(student: Student) -> set[str]:
    return {name for name, parameter in student.named_parameters() if parameter.requires_grad}


def parts(names: set[str]) -> set[str]:
    """The first component of each name, for the backbone the first two."""
    return {".".join(name.split(".")[: 2 if name.startswith("backbone") else 1]) for name in names}


HEAD = {True: "backbone.embedding", False: "backbone.output_layer"}


def recipe(name: str, *, tied: bool, freeze: bool) -> set[str]:
    """What a stage trains. The token table is left out where no gradient could reach it."""
    backbone = set() if freeze else {"backbone.decoder"}
    return {
        "1a": {"byte_encoder"},
        "1b": {"byte_encoder"} | backbone | (set() if freeze else {HEAD[tied]}),
        "1c": {"router"},
        "2a": {"byte_decoder"},
        "2b": BYTE_SIDE | backbone,
        "3a": BYTE_SIDE | backbone,
    }[name]


@pytest.mark.parametrize(("name", "freeze"), CASES)
@pytest.mark.parametrize("tied", [True, False])
def test_the_trainable_parts_are_the_recipes(name: str, tied: bool, freeze: bool) -> None:
    student = tiny_student(tied=tied)
    prefixes = STAGES[name].trains(replace(CONFIG, freeze_backbone=freeze), replace(BACKBONE, tied_embeddings=tied))
    names = [parameter for parameter, _ in student.named_parameters()]
    assert all(any(parameter.startswith(prefix) for parameter in names) for prefix in prefixes)
    set_trainable(student, prefixes)
    assert parts(trainable(student)) == recipe(name, tied=tied, freeze=freeze)
    whole = {parameter for parameter in names if parts({parameter}) <= recipe(name, tied=tied, freeze=freeze)}
    assert trainable(student) == whole


@pytest.mark.parametrize(("name", "freeze"), CASES)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("way", ["ours-conv", "ours-mamba2", "causal-router", "official"])
def test_every_trained_parameter_gets_a_gradient_and_no_other_does(
    name: str, tied: bool, freeze: bool, way: str
) -> None:
    mixer = ByteMixer.CONV if way == "ours-conv" else ByteMixer.MAMBA2
    mode = {"official": DechunkMode.OFFICIAL, "causal-router": DechunkMode.CAUSAL}.get(way, DechunkMode.HARD)
    config = replace(CONFIG if way.startswith("ours") else OFFICIAL, freeze_backbone=freeze)
    student = tiny_student(mixer, mode, tied=tied)
    found = stage_gradients(name, config, student)
    assert set(found) == trainable(student)
    dead = sorted(parameter for parameter, value in found.items() if not value.any())
    # official mode reads null_group only where a row does not begin with an end
    assert set(dead) <= {"byte_decoder.null_group"}, dead
    assert all(bool(value.isfinite().all()) for value in found.values())


def test_null_group_learns_where_the_router_does_not_end_a_rows_first_byte() -> None:
    student = tiny_student(mode=DechunkMode.OFFICIAL)
    with torch.no_grad():
        # q of one vector and k of the same: the first byte looks just like the next
        for parameter, other in zip(student.router.q.parameters(), student.router.k.parameters(), strict=True):
            parameter.copy_(other)
    found = stage_gradients("2a", OFFICIAL, student)
    assert found["byte_decoder.null_group"].any()


def test_a_frozen_backbone_tells_the_encoder_the_same() -> None:
    student = tiny_student()
    own: Backbone = student.backbone  # type: ignore[assignment]
    other = tiny_backbone().requires_grad_(False)
    found = {}
    for freeze in (True, False):
        config = replace(CONFIG, freeze_backbone=freeze)
        set_trainable(student, STAGES["1b"].trains(config, own.backbone_config))
        objective = STAGES["1b"].objective(config, other, None)
        row = random_rows(1)[0]
        found[freeze] = gradients(student, lambda o=objective, r=row: o.losses(student, r)["reverse kl"])
    encoder = {name: value for name, value in found[False].items() if name.startswith("byte_encoder.")}
    assert len(found[False]) > len(encoder)
    assert_same(found[True], encoder)
