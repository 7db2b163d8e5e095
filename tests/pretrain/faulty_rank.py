"""The job, one rank of which goes wrong at its third update: python -m tests.pretrain.faulty_rank RANK KIND FLAG…"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from megabyte_distill.pretrain.main import main


def misbehave(kind: str) -> None:
    if kind == "sleep":
        time.sleep(3600)
    if kind == "crash":
        os.abort()
    raise OSError(5, "Input/output error", "data.bin")


def plant(kind: str) -> None:
    from megabyte_distill.training.rows import MicroBatches

    read = MicroBatches.next_micro_batches
    calls = 0

    def next_micro_batches(self: MicroBatches, iteration: int) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            misbehave(kind)
        return read(self, iteration)

    MicroBatches.next_micro_batches = next_micro_batches  # type: ignore[method-assign]


if __name__ == "__main__":
    rank, kind, *flags = sys.argv[1:]
    if os.environ["RANK"] == rank:
        plant(kind)
    raise SystemExit(main(flags))
