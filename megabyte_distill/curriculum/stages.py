"""All stages by name, in the order in which they run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from megabyte_distill.config.stage import TRAINS_ALL, BoundarySource, StageConfig, TargetsFrom
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


def resolved_stages(stages: Mapping[str, StageConfig], behind: Sequence[str] = ()) -> dict[str, StageConfig]:
    """The stages' settings where ``--exact-targets-from auto`` is decided.

    The student's own backbone tells what the teacher would where its chunks are tokens, 1a and 1b have taught it to
    read the encoder's states (1b's few updates alone do not: docs/results.md, "Ablations"), and nothing since has
    changed it under its token head.

    Args:
        stages: settings by name, in the order in which they run one after the other.
        behind: stages that the weights have been through before, in order.
    """
    found, passed = {}, list(behind)
    for name, config in stages.items():
        if config.exact_targets_from is TargetsFrom.AUTO:
            are_tokens = config.boundary_source is BoundarySource.GOLD and config.target_bytes_per_chunk is None
            since = passed[len(passed) - passed[::-1].index("1b") :] if "1b" in passed else TRAINS_ALL
            tells = are_tokens and "1a" in passed and not set(since) & set(TRAINS_ALL)
            config = replace(config, exact_targets_from=TargetsFrom.STUDENT if tells else TargetsFrom.TEACHER)
        found[name] = config
        passed.append(name)
    return found
