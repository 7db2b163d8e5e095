"""2a, byte SFT step 1: the decoder learns to speak bytes; encoder, router and backbone stay."""

from __future__ import annotations

from megabyte_distill.curriculum.byte_sft import MEASURE, decoder_objective
from megabyte_distill.curriculum.stage import Stage, TeacherNeed

STAGE = Stage(
    name="2a",
    title="byte SFT, decoder",
    trains=lambda config, backbone: ("byte_decoder.",),
    teacher=TeacherNeed.NONE,
    objective=decoder_objective,
    measure=MEASURE,
)
