"""What a run says: Megatron's log line, tensorboard, and wandb where asked for. NaN and negative values are shown."""

from __future__ import annotations

import datetime
import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from megabyte_distill import optional

METRICS_FILE = "metrics.jsonl"


def timestamp() -> str:
    """Local time as Megatron prints it."""
    return datetime.datetime.now().strftime("%Y-%m-%d %H:%M:%S")


def duration(seconds: float) -> str:
    """h:mm:ss."""
    return str(datetime.timedelta(seconds=max(0, round(seconds))))


def say(text: str, stream: TextIO | None = None) -> None:
    """One line, seen at once also through a pipe."""
    print(text, file=stream or sys.stdout, flush=True)


def log_line(
    *,
    stage: str,
    iteration: int,
    train_iters: int,
    consumed_rows: int,
    milliseconds: float,
    learning_rate: float,
    global_batch_size: int,
    averages: Mapping[str, float],
    grad_norm: float,
    skipped: int,
    nan_iterations: int,
    nondeterministic: int | None = None,
    bytes_per_second: float,
    eta_seconds: float,
    teraflops: float | None = None,
) -> str:
    """Megatron's line with our cells. Every average is printed, NaN and negative ones included.

    ``nondeterministic``: updates of which a second pass differed; None where none is checked.
    ``teraflops``: a rank and second, where they were counted.
    """
    cells = [
        f"[{timestamp()}] stage {stage} iteration {iteration:7d}/{train_iters:7d}",
        f"consumed samples: {consumed_rows}",
        f"elapsed time per iteration (ms): {milliseconds:.1f}",
        f"bytes/s: {bytes_per_second:.0f}",
        *([] if teraflops is None else [f"throughput per GPU (TFLOP/s/GPU): {teraflops:.4g}"]),
        f"ETA: {duration(eta_seconds)}",
        f"learning rate: {learning_rate:.6E}",
        f"global batch size: {global_batch_size}",
        *(f"{name}: {value:.6E}" for name, value in averages.items()),
        f"grad norm: {grad_norm:.3f}",
        f"number of skipped iterations: {skipped}",
        f"number of nan iterations: {nan_iterations}",
    ]
    if nondeterministic is not None:
        cells.append(f"number of non-deterministic iterations: {nondeterministic}")
    return " " + " | ".join(cells) + " |"


def _drop_unfinished_line(path: Path) -> None:
    """Cut off what a killed process left of its last line, or the next record would be glued to it."""
    if not path.exists():
        return
    with open(path, "rb+") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)


class MetricWriter:
    """Scalars to tensorboard, to wandb where a project is named, and to metrics.jsonl (what the plots are made from).

    Only the main rank writes; a writer without a folder swallows everything.
    """

    def __init__(
        self,
        folder: Path | None,
        *,
        tensorboard_dir: Path | None = None,
        wandb_project: str | None = None,
        config: Any = None,
    ) -> None:
        self._file: TextIO | None = None
        self._tensorboard: Any = None
        self._wandb: Any = None
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        _drop_unfinished_line(folder / METRICS_FILE)
        self._file = open(folder / METRICS_FILE, "a", encoding="utf-8")  # noqa: SIM115 - lives as long as the run
        from torch.utils.tensorboard.writer import SummaryWriter

        self._tensorboard = SummaryWriter(str(tensorboard_dir or folder / "tensorboard"))
        if wandb_project:
            self._wandb = optional.require_wandb().init(project=wandb_project, config=config, dir=str(folder))

    def write(self, stage: str, iteration: int, values: Mapping[str, float]) -> None:
        """Record scalars at an iteration of a stage."""
        if self._file is None:
            return
        # JSON has no NaN: what is not finite is null there
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        record = {"stage": stage, "iteration": iteration, "time": time.time(), **finite}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._tensorboard.add_scalar(f"{stage}/{name}", value, iteration)
        if self._wandb is not None:
            self._wandb.log({f"{stage}/{name}": value for name, value in values.items()})

    def close(self) -> None:
        """Flush and close everything."""
        if self._file is not None:
            self._file.close()
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()
