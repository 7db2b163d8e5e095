"""What a job would do and need, without teacher, data, GPU or ranks: --dry-run."""

from __future__ import annotations

from pathlib import Path

from megabyte_distill.config import Settings
from megabyte_distill.config.run_config import run_config_text
from megabyte_distill.memory.estimate import estimate
from megabyte_distill.memory.report import BYTES_PER_CHUNK, backbone_of, heading, table
from megabyte_distill.training.logging import say


def dry_run(settings: Settings, world_size: int, hf_teacher: Path | None = None) -> None:
    """Print the resolved settings, then each stage's parameters and memory on each pipeline rank.

    ``hf_teacher``: a Hugging Face folder whose shape is taken. ValueError where nothing says the teacher's shape, or
    sizes do not fit together.
    """
    backbone = backbone_of(settings, hf_teacher)
    say(run_config_text(settings).rstrip("\n"))
    say(heading(settings, backbone, world_size, BYTES_PER_CHUNK))
    for line in table(estimate(settings, backbone, world_size=world_size, bytes_per_chunk=BYTES_PER_CHUNK)):
        say(line)
    for name, config in settings.stages.items():
        say(
            f"stage {name}: {config.train_iters:,} updates of {config.bytes_per_update:,} bytes = "
            f"{_in_words(config.train_iters * config.bytes_per_update)} bytes"
        )
    say("dry run: nothing was read, trained or written")


def _in_words(count: int) -> str:
    for name, size in (("billion", 10**9), ("million", 10**6)):
        if count >= size:
            return f"{count / size:,.2f} {name}"
    return f"{count:,}"
