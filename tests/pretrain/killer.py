"""Starts a job again and again and kills it, in forks of one process so that a start costs no imports.

    python -m tests.pretrain.killer RUN KILLS SEED FLAG…        prints one JSON object
"""

from __future__ import annotations

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


def is_saving(run: Path) -> bool:
    return any(run.glob("*/*.incomplete"))


def kill_at_random(run: Path, flags: list[str], choose: random.Random) -> str | None:
    """Start, wait for a random moment, SIGKILL. What the job was doing, None where it ended before."""
    during_save = choose.random() < 0.5
    wanted = progress(run) + choose.choice((0, 0, 1, 1, 2))
    pause = choose.uniform(0.0, 0.02 if during_save else 0.15)
    child, started = start(flags), time.monotonic()
    while progress(run) < wanted or (during_save and not is_saving(run)):
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
    return "save" if is_saving(run) else "elsewhere"


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
