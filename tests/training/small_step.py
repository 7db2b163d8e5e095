"""The last stage's update on a tiny student, without a run: a trainer, its objective, rows."""

from __future__ import annotations

import torch

from megabyte_distill.config.stage import StageConfig
from megabyte_distill.curriculum.stages import STAGES
from megabyte_distill.model.student import set_trainable
from megabyte_distill.objectives.objective import Objective
from megabyte_distill.parallel.process_groups import World
from megabyte_distill.training.optimizer import TrainerModel, wrap_for_training
from tests.tiny_student import tiny_student

CONFIG = StageConfig(lr=1e-3, train_iters=10)


def small_trainer(world: World) -> tuple[TrainerModel, Objective]:
    """2b on random weights, the same on every rank."""
    torch.manual_seed(2)
    student = tiny_student()
    stage = STAGES["2b"]
    set_trainable(student, stage.trains(CONFIG, student.backbone.backbone_config))
    student.to(world.device).train()
    return wrap_for_training(student, student.config, CONFIG), stage.objective(CONFIG, None, None)
