"""Starts a job again and again and kills it, in forks of one process so that a start costs no imports.

python -m tests.pretrain.killer RUN KILLS SEED FLAG…        prints one JSON object
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import megabyte_distill.pretrain.closing
import megabyte_distill.pretrain.stage_runner  # noqa: F401 - imported once, before the forks
from megabyte_distill.pretrain.main import main

PATIENCE = 60.0


def start(flags: list[str]) -> int:
    """Fork a job; its process id."""
    child = os.fork()
    if child:
        return child
    sys.stdout.flush()
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os._exit(main(flags))


def has_ended(child: int) -> bool:
    return os.waitpid(child, os.WNOHANG)[0] != 0


def progress(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def saves_begun(run: Path) -> set[tuple[str, int]]:
    """Unfinished saves, each by its folder and inode."""
    found = set()
    for path in run.glob("*/*.incomplete"):
        with contextlib.suppress(FileNotFoundError):  # finished meanwhile
            found.add((str(path), path.stat().st_ino))
    return found


def kill_at_random(run: Path, flags: list[str], choose: random.Random) -> str | None:
    """Start, wait for a random moment, SIGKILL. What the job was doing, None where it ended before."""
    during_save = choose.random() < 0.5
    wanted = progress(run) + choose.choice((0, 0, 1, 1, 2))
    pause = choose.uniform(0.0, 0.02 if during_save else 0.15)
    before = saves_begun(run)
    child, started = start(flags), time.monotonic()
    while progress(run) < wanted or (during_save and saves_begun(run) <= before):
        if has_ended(child):
            return None
        if time.monotonic() - started > PATIENCE:
            os.kill(child, signal.SIGKILL)
            raise TimeoutError("the job makes no progress")
        time.sleep(0.0005)
    time.sleep(pause)
    if has_ended(child):
        return None
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "elsewhere" if saves_begun(run) <= before else "save"


def kill_and_finish(run: Path, kills: int, seed: int, flags: list[str]) -> dict[str, object]:
    """Kill a job ``kills`` times, then let it end."""
    choose = random.Random(seed)
    moments = []
    for _ in range(kills):
        moment = kill_at_random(run, flags, choose)
        if moment is None:
            break
        moments.append(moment)
    _, status = os.waitpid(start(flags), 0)
    return {"moments": moments, "exit code": os.waitstatus_to_exitcode(status)}


if __name__ == "__main__":
    target, count, number, *rest = sys.argv[1:]
    print(json.dumps(kill_and_finish(Path(target), int(count), int(number), rest)))
