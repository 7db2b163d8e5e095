"""Starts tools/cache_teacher.py again and again and kills it at random moments, then lets it end.

python -m tests.pretrain.cache_killer CACHE KILLS SEED FLAG…        forks, so that a start costs no imports; exit code 0
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import megabyte_distill.conversion.teacher_folder
import megabyte_distill.pretrain.cache_teacher  # noqa: F401 - imported once, before the forks
from megabyte_distill.training.target_cache import TargetCache
from tools.cache_teacher import main

PATIENCE = 60.0


def start(flags: Sequence[str]) -> int:
    """The tool in a fork of this process."""
    child = os.fork()
    if child:
        return child
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    os._exit(main(flags))


def files(folder: Path) -> int:
    return len(list(folder.glob("shard_*"))) if folder.exists() else 0


def is_complete(folder: Path) -> bool:
    try:
        TargetCache(folder)
    except ValueError:
        return False
    return True


def kill_at_random(folder: Path, flags: Sequence[str], choose: random.Random) -> None:
    """Wait until something new is written, and a little longer."""
    before, child, limit = files(folder), start(flags), time.monotonic() + PATIENCE
    while files(folder) <= before:
        assert not os.waitpid(child, os.WNOHANG)[0], "the tool ended before it was killed: make the shards smaller"
        assert time.monotonic() < limit, "the tool makes no progress"
        time.sleep(0.0005)
    time.sleep(choose.uniform(0, 0.01))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert not is_complete(folder)


if __name__ == "__main__":
    target, count, number, *rest = sys.argv[1:]
    numbers = random.Random(int(number))
    for _ in range(int(count)):
        kill_at_random(Path(target), rest, numbers)
    _, status = os.waitpid(start(rest), 0)
    assert is_complete(Path(target))
    sys.exit(os.waitstatus_to_exitcode(status))
