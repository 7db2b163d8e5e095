"""Layers that keep copies of their weights between micro-batches train and evaluate as layers that keep none."""

from __future__ import annotations

from pathlib import Path

import torch

from megabyte_distill.config.stage import LrDecayStyle, StageConfig
from megabyte_distill.curriculum.stages import STAGES
from megabyte_distill.model.backbone import Backbone, transformer_config
from megabyte_distill.model.student import Student, set_trainable
from megabyte_distill.parallel.process_groups import World
from megabyte_distill.training.checkpoint import load_checkpoint, save_checkpoint
from megabyte_distill.training.optimizer import wrap_for_training
from megabyte_distill.training.step import evaluate, train_step
from tests.model.engine_twin import KeptColumn, twin_parts
from tests.tiny_student import BACKBONE, BYTE_SIDE, enlarged, random_rows, world

__all__ = ["world"]
CONFIG = StageConfig(lr=1e-2, backbone_lr=1e-2, lr_decay_style=LrDecayStyle.CONSTANT)


def student_of(backbone: Backbone) -> Student:
    return enlarged(Student(BYTE_SIDE, backbone))


def losses(student: Student, world: World) -> list[float]:
    """Of three updates of two micro-batches each, and of an evaluation behind each of them."""
    stage, rows = STAGES["2b"], random_rows(2, seed=3)
    set_trainable(student, stage.trains(CONFIG, BACKBONE))
    trained = wrap_for_training(student, student.config, CONFIG)
    objective = stage.objective(CONFIG, None, None)
    found = []
    for iteration in range(3):
        report = train_step(trained, objective, rows, iteration, world)
        held_out = evaluate(trained.module, objective, [random_rows(1, seed=5)], world)
        found += [report.sums["byte ce"][0], report.grad_norm, held_out["byte ce"][0]]
    return found


def test_an_update_reaches_the_next_forward_pass_in_training_and_evaluation(world: World, tmp_path: Path) -> None:
    config = transformer_config(BACKBONE)
    plain, keeping = (
        student_of(Backbone(BACKBONE, config)),
        student_of(Backbone(BACKBONE, config, twin_parts(BACKBONE))),
    )
    path = save_checkpoint(tmp_path, 1, plain, optimizer=None, loop={}, texts={})
    load_checkpoint(path, keeping)
    expected, got = losses(plain, world), losses(keeping, world)
    torch.testing.assert_close(torch.tensor(got), torch.tensor(expected), rtol=1e-4, atol=1e-4)
    assert len(set(expected)) == len(expected)
    kept = [module for module in keeping.modules() if isinstance(module, KeptColumn)]
    # what an evaluation left behind is not taken for the weights of the next update
    assert kept and all(torch.equal(module.copy, module.weight) and not module.is_first_microbatch for module in kept)
