"""What a checkpoint costs: how long training waits for a save, at once and beside it, and how long its check takes.

    python benchmarks/checkpoints.py [--megabytes 1024] [--folder DIR] [--quick]

Saves random weights of that size on one rank, with and without hashes, and prints one JSON object of seconds.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TENSOR_MEGABYTES = 16


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--megabytes", type=int, default=1024, help="size of the weights (1024)")
    parser.add_argument("--folder", type=Path, default=None, help="where to write; a temporary folder if not given")
    parser.add_argument("--repeats", type=int, default=3, help="of which the fastest counts (3)")
    parser.add_argument("--quick", action="store_true", help="32 MB, once: under a minute")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.megabytes, arguments.repeats = 32, 1
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        print(json.dumps(measure(Path(folder), arguments.megabytes, arguments.repeats)))
    return 0


def measure(folder: Path, megabytes: int, repeats: int) -> dict[str, Any]:
    """Seconds of each part, the fastest of ``repeats`` rounds in which all take turns."""
    import torch
    from torch import nn

    from megabyte_distill.parallel.process_groups import world
    from megabyte_distill.training import checkpoint, checkpoint_writer
    from megabyte_distill.training.checkpoint import PendingSave, begin_save, verify_checkpoint
    from megabyte_distill.training.checkpoint_writer import CheckpointWriter

    def begin(name: str, *, background: bool) -> PendingSave:
        writer = CheckpointWriter(background=background)
        return begin_save(folder / name, 1, model, optimizer=None, loop={}, texts={}, writer=writer)

    seconds: dict[str, list[float]] = {}

    def timed(name: str, started: float) -> None:
        seconds.setdefault(name, []).append(round(time.perf_counter() - started, 3))

    with world() as ranks:
        rows = TENSOR_MEGABYTES * 2**20 // 4 // 1024
        layers = [nn.Linear(1024, rows, bias=False) for _ in range(megabytes // TENSOR_MEGABYTES)]
        model = nn.ModuleList(layers).to(ranks.device)
        hashing = checkpoint_writer.records_of
        for _ in range(repeats):
            started = time.perf_counter()
            path = begin("at once", background=False).finish()
            timed("save at once", started)
            started = time.perf_counter()
            verify_checkpoint(path)
            timed("check every file", started)
            checkpoint.records_of = checkpoint_writer.records_of = lambda paths: {}
            started = time.perf_counter()
            begin("without hashes", background=False).finish()
            timed("save at once without hashes", started)
            checkpoint.records_of = checkpoint_writer.records_of = hashing
            started = time.perf_counter()
            pending = begin("beside", background=True)
            timed("save beside the training: until it goes on", started)
            while not pending.is_done():
                time.sleep(0.01)
            timed("save beside the training: until it is written", started)
            started = time.perf_counter()
            pending.finish()
            timed("save beside the training: to put it in place", started)
    return {"megabytes": megabytes, "device": str(ranks.device), "torch": torch.__version__,
            "seconds": {name: min(times) for name, times in seconds.items()}}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
