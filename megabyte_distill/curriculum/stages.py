"""All stages by name, in the order in which they run."""

from __future__ import annotations

from megabyte_distill.curriculum import (
    boundary_learning,
    decoder_sft,
    dialogue_sft,
    embedding_alignment,
    full_sft,
    joint_distillation,
)
from megabyte_distill.curriculum.stage import Stage

STAGES: dict[str, Stage] = {
    module.STAGE.name: module.STAGE
    for module in (embedding_alignment, joint_distillation, boundary_learning, decoder_sft, full_sft, dialogue_sft)
}
