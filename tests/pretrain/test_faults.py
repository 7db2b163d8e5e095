"""A rank that dies, fails or hangs takes the job down soon, and is named with where everybody was."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.pretrain.job import ROOT, SCRIPT, Job, environment

ENDLESS = (
    "--stages", "1a", "--train-iters", "100000", "--eval-interval", "0", "--eval-iters", "0", "--save-interval", "0",
)  # fmt: skip
PATIENCE = 90.0
SOON = 20.0
"""Seconds within which the other rank must have ended: no matter of the timeout, which is 10 minutes."""


@contextmanager
def two_ranks(words: list[str]) -> Iterator[list[subprocess.Popen[str]]]:
    """Two ranks without torchrun, which would end the second one by itself."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [
        subprocess.Popen(
            [sys.executable, *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=ROOT,
            env=environment(**common, RANK=str(rank), LOCAL_RANK=str(rank)),
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        yield ranks
    finally:
        for process in ranks:
            process.kill()
            process.communicate()


def record(run: Path, rank: int) -> dict[str, object]:
    return json.loads((run / ".ranks" / f"rank_{rank:05d}.json").read_text())


def wait_until_training(run: Path, ranks: list[subprocess.Popen[str]]) -> None:
    deadline = time.monotonic() + PATIENCE
    path = run / "metrics.jsonl"
    while not (path.exists() and path.read_bytes().count(b"\n") > 2):
        assert all(process.poll() is None for process in ranks), [process.stderr.read() for process in ranks]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def ended(process: subprocess.Popen[str], within: float) -> str:
    """What a rank said on its way out, which it must have found within a time and with exit code 1."""
    said = process.communicate(timeout=within)[1]
    assert process.returncode == 1, said
    return said


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_other_one_which_says_where_both_were(job: Job, tmp_path: Path, victim: int) -> None:
    run = tmp_path / "run"
    with two_ranks([str(SCRIPT), *job.flags(run, *ENDLESS)]) as ranks:
        wait_until_training(run, ranks)
        pid = record(run, victim)["pid"]
        assert pid == ranks[victim].pid
        os.kill(ranks[victim].pid, signal.SIGKILL)
        said = ended(ranks[1 - victim], within=SOON)
    assert f"rank {victim} (pid {pid}) died without a word" in said
    phases = "data|count|forward of micro-batch 0|backward of micro-batch 0|reduce|step"
    for rank in (0, 1):
        assert re.search(rf"rank {rank}: stage 1a iteration \d+, ({phases}), for [\d.]+ s \(pid \d+ on ", said), said
    assert "Traceback" not in said
    assert record(run, 1 - victim)["outcome"] == "lost contact with another rank"


@pytest.mark.parametrize(
    ("kind", "cause"),
    [
        ("fail", "rank 1 failed: OSError: [Errno 5] Input/output error: 'data.bin'"),
        ("crash", "died without a word (killed, perhaps for want of memory, or crashed) at stage 1a iteration 3, data"),
    ],
)
def test_a_rank_that_fails_is_named_by_the_other_one_too(job: Job, tmp_path: Path, kind: str, cause: str) -> None:
    words = ["-m", "tests.pretrain.faulty_rank", "1", kind, *job.flags(tmp_path / "run", *ENDLESS)]
    with two_ranks(words) as ranks:
        ranks[1].wait(PATIENCE)
        assert cause in ended(ranks[0], within=SOON)


@pytest.mark.parametrize("sleeper", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_rank_that_hangs_is_found_at_the_timeout_and_both_end(job: Job, tmp_path: Path, sleeper: int) -> None:
    minutes = 0.1
    flags = job.flags(tmp_path / "run", *ENDLESS, "--distributed-timeout-minutes", str(minutes))
    with two_ranks(["-m", "tests.pretrain.faulty_rank", str(sleeper), "sleep", *flags]) as ranks:
        waiting = ended(ranks[1 - sleeper], within=PATIENCE)
        sleeping = ended(ranks[sleeper], within=SOON)
    assert f"furthest behind: rank {sleeper}" in waiting
    assert f"rank {sleeper}: stage 1a iteration 3, data" in waiting
    assert "another rank is gone, and this one did not notice" in sleeping
    assert "warning: no progress for 90% of --distributed-timeout-minutes 0.1" in (waiting if sleeper else sleeping)
