"""2a, byte SFT step 1: the decoder learns to speak bytes; encoder, router and backbone stay."""

from __future__ import annotations

from megabyte_distill.curriculum.byte_sft import MEASURE, ByteSft, teacher_need
from megabyte_distill.curriculum.stage import Stage

STAGE = Stage(
    name="2a",
    title="byte SFT, decoder",
    trains=lambda config, backbone: ("byte_decoder.",),
    teacher=teacher_need,
    objective=lambda config, teacher, table: ByteSft(config, teacher, table, trains_router=False),
    measure=MEASURE,
)
