"""2a, byte SFT step 1: the decoder learns to speak bytes; encoder, router and backbone stay."""

from __future__ import annotations

from megabyte_distill.config.stage import StageConfig, TargetsFrom
from megabyte_distill.curriculum.byte_sft import MEASURE, ByteSft, teacher_need
from megabyte_distill.curriculum.stage import Stage, TeacherNeed


def _teacher(config: StageConfig) -> TeacherNeed:
    """None where the student's own frozen backbone tells."""
    return TeacherNeed.NONE if config.exact_targets_from is TargetsFrom.STUDENT else teacher_need(config)


STAGE = Stage(
    name="2a",
    title="byte SFT, decoder",
    trains=lambda config, backbone: ("byte_decoder.",),
    teacher=_teacher,
    objective=lambda config, teacher, table: ByteSft(config, teacher, table, trains_router=False),
    measure=MEASURE,
)
