"""When checkpoints of a stage are written, finished and removed; at most one is under way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from megabyte_distill.parallel.process_groups import World, on_main_rank
from megabyte_distill.training.checkpoint import OptimizerState, PendingSave, begin_save, remove_old_checkpoints
from megabyte_distill.training.checkpoint_writer import CheckpointWriter
from megabyte_distill.training.logging import say


@dataclass(kw_only=True)
class Saver:
    """Writes the checkpoints of one stage. Every method but :meth:`is_writing` is called by all ranks together."""

    folder: Path
    world: World
    background: bool = False
    """Write beside the training (``--async-save``)."""
    keep_last_checkpoints: int = 0
    """0 keeps all."""
    save_retain_interval: int = 0
    texts: Mapping[str, str] = field(default_factory=dict)
    """Small files for each checkpoint: run_config.yaml."""
    _pending: PendingSave | None = None

    def is_writing(self) -> bool:
        """Whether this rank's part of a save is not on disk yet."""
        return self._pending is not None and not self._pending.is_done()

    def save(self, iteration: int, model: nn.Module, optimizer: OptimizerState | None, loop: Mapping[str, Any]) -> None:
        """Begin a checkpoint, after the one under way is complete; without ``background`` it is complete on return."""
        self.finish()
        self._pending = begin_save(
            self.folder,
            iteration,
            model,
            optimizer=optimizer,
            loop=loop,
            texts=self.texts,
            writer=CheckpointWriter(background=self.background),
        )
        if not self.background:
            self.finish()

    def finish(self) -> None:
        """Wait for a save that is under way and put it in place; CheckpointError where it failed on any rank."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        path = pending.finish()
        if self.world.is_main:
            say(f" saved {path}")
        if self.keep_last_checkpoints:
            on_main_rank(self.world, self._remove_old)

    def _remove_old(self) -> None:
        remove_old_checkpoints(
            self.folder, keep_last=self.keep_last_checkpoints, retain_interval=self.save_retain_interval
        )
