"""3a, dialogue SFT: 2b goes on on dialogues, with the byte loss on the answers alone, by the data's loss mask.

The router learns on prompts as well: it cuts them too.
"""

from __future__ import annotations

from megabyte_distill.curriculum.byte_sft import ByteSft
from megabyte_distill.curriculum.full_sft import trains_all
from megabyte_distill.curriculum.stage import Stage, TeacherNeed

MEASURE = "answers' joint bits per byte"

STAGE = Stage(
    name="3a",
    title="byte SFT, dialogues",
    trains=trains_all,
    # hard targets, for --byte-targets does not act here: what a teacher of plain text would say after a prompt is not
    # what the data answer
    teacher=lambda config: TeacherNeed.NONE,
    objective=lambda config, teacher, table: ByteSft(config, None, None, trains_router=True, measure=MEASURE),
    measure=MEASURE,
    reads_loss_mask=True,
)
