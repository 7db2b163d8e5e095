"""Stages of the tiny preset ready to be updated one after the other in one process, so that their times compare."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from benchmarks.curriculum_runs import EXAMPLE
from megabyte_distill.config import Settings, parse_arguments
from megabyte_distill.conversion.model_config import ModelConfig
from megabyte_distill.conversion.teacher_folder import load_teacher
from megabyte_distill.curriculum.stage import TeacherNeed
from megabyte_distill.curriculum.stages import STAGES
from megabyte_distill.data.dataset import ByteTokenDataset
from megabyte_distill.data.sampler import RowStream
from megabyte_distill.model.student import set_trainable
from megabyte_distill.parallel.process_groups import World
from megabyte_distill.pretrain.example import Example
from megabyte_distill.runs import build_student
from megabyte_distill.training.optimizer import wrap_for_training
from megabyte_distill.training.rows import MicroBatches
from megabyte_distill.training.step import train_step
from megabyte_distill.training.target_cache import TargetCache


class Arm:
    """One stage of the tiny preset with fresh weights and the embedded teacher, under some flags."""

    def __init__(self, stage: str, root: Path, dataset: ByteTokenDataset, flags: Sequence[str], here: World) -> None:
        """``root``: with the prepared example. A ``--logits-load-dir`` among the flags stands for the teacher."""
        settings: Settings = parse_arguments(["--stages", stage, *flags], Example(EXAMPLE).defaults(root))
        config = settings.stages[stage]
        teacher = load_teacher(root / "teacher", dtype=torch.float32)
        byte_side = settings.model.byte_side_for(teacher.config.hidden_size)
        torch.manual_seed(1)
        student = build_student(ModelConfig(backbone=teacher.config, byte_side=byte_side))
        set_trainable(student, STAGES[stage].trains(config, teacher.config))
        needs_teacher = STAGES[stage].teacher(config) is TeacherNeed.FROZEN
        backbone = teacher.backbone.requires_grad_(False).eval() if needs_teacher else None
        self.objective = STAGES[stage].objective(config, backbone, teacher.token_bytes)
        self.trained = wrap_for_training(student, student.config, config, bf16=False)
        stream = RowStream([dataset], row_bytes=config.seq_length, chunk_bucket=config.chunk_bucket, seed=5)
        stored = None
        if config.logits_load_dir is not None:
            opened = TargetCache(Path(config.logits_load_dir))
            stored = lambda plan: opened.of_row(plan, stream.datasets, stream.row_bytes)  # noqa: E731
        self.rows = MicroBatches(stream, config, here, stored_targets=stored)
        self.bytes_per_update = config.bytes_per_update
        self.here, self.updates = here, 0
        student.train()

    def update(self) -> float:
        """Seconds of this process, reading included: a machine that does other things as well does not count."""
        started = time.process_time()
        report = train_step(
            self.trained, self.objective, self.rows.next_micro_batches(self.updates), self.updates, self.here
        )
        assert not report.skipped, report
        self.updates += 1
        return time.process_time() - started


def in_turns(arms: Mapping[str, Arm], updates: int) -> dict[str, float]:
    """Median processor seconds of an update of each arm; the first one warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(updates + 1):
        for name, arm in arms.items():
            taken = arm.update()
            seconds[name] += [taken] if number else []
    return {name: statistics.median(values) for name, values in seconds.items()}
