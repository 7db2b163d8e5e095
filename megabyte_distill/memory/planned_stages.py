"""What training decides of a stage by what its weights have been through, told beforehand from folders and settings."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from megabyte_distill.config import STAGE_ORDER, Settings, StageConfig
from megabyte_distill.config.model import BackboneConfig
from megabyte_distill.curriculum.stages import STAGES, resolved_stages
from megabyte_distill.run_folder import is_run
from megabyte_distill.runs import StageProgress, complete_stages, kept_backbone, stage_progress

FROM_TEACHER = ("1a", "1b")
"""Stages that begin a curriculum: the first of a list starts from the teacher where no run says otherwise. Any other
stands behind a 1b that is not in the list, which has trained the backbone."""


class PlannedStage(NamedTuple):
    """A selected stage."""

    name: str
    config: StageConfig
    """With ``--exact-targets-from auto`` decided."""
    shares_teacher: bool
    """Whether the student's own backbone serves where a frozen teacher is needed."""


def planned_stages(settings: Settings, backbone: BackboneConfig) -> Iterator[PlannedStage]:
    """The selected stages in order, as they would run in turn behind what ``--load`` and ``--save`` hold."""
    source = complete_stages(load) if (load := _run(settings.checkpoint.load)) else []
    root = None if settings.run.fresh else _run(settings.checkpoint.save)
    behind = [progress.stage for progress in source]
    first = next(name for name in STAGE_ORDER if name in settings.stages)
    keeps = _keeps(settings, source[-1]) if source else load is None and first in FROM_TEACHER
    for name in STAGE_ORDER:
        own, config = stage_progress(root, name) if root else None, settings.stages.get(name)
        keeps = keeps if own is None else _keeps(settings, own)
        if config is not None:
            config = resolved_stages({name: config}, behind)[name]
            keeps = keeps and STAGES[name].keeps_backbone(config, backbone)
            yield PlannedStage(name, config, keeps and settings.engine.serves_twice)
        if config is not None or own is not None:
            behind.append(name)


def _run(folder: str | None) -> Path | None:
    return Path(folder) if folder is not None and is_run(Path(folder)) else None


def _keeps(settings: Settings, progress: StageProgress) -> bool:
    kept = kept_backbone(progress.checkpoint)
    return kept is not None and kept.bf16 == settings.run.bf16
