"""3a, dialogue SFT: 2b goes on, on the answers of dialogues alone; the loss mask of the data leaves the prompts out."""

from __future__ import annotations

from dataclasses import replace

from megabyte_distill.config.stage import ByteTargets, StageConfig
from megabyte_distill.curriculum.byte_sft import ByteSft
from megabyte_distill.curriculum.full_sft import trains_all
from megabyte_distill.curriculum.stage import Stage, TeacherNeed

MEASURE = "answers' joint bits per byte"


def _objective(config: StageConfig) -> ByteSft:
    # what a teacher of plain text would say after a prompt is not what the data answer
    hard = replace(config, byte_targets=ByteTargets.HARD)
    return ByteSft(hard, None, None, trains_router=True, measure=MEASURE)


STAGE = Stage(
    name="3a",
    title="byte SFT, dialogues",
    trains=trains_all,
    teacher=lambda config: TeacherNeed.NONE,
    objective=lambda config, teacher, table: _objective(config),
    measure=MEASURE,
    reads_loss_mask=True,
)
