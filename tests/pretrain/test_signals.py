"""Ctrl-C and kill: the job finishes its update, saves and says so; the same command goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.distributed.test_data_parallel import assert_close
from tests.pretrain.job import ROOT, SCRIPT, Job, assert_same_run, environment, run_command, torchrun

LONG = ("--1a.train-iters", "2000", "--1a.eval-interval", "0", "--1a.save-interval", "0", "--stages", "1a")
PATIENCE = 120.0
GRACE = 30.0
"""Seconds that torchrun grants its ranks."""


@contextmanager
def started(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    """A job in its own process group; whatever is left of it at the end is killed."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, env=environment(),
        start_new_session=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for_updates(run: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + PATIENCE
    path = run / "metrics.jsonl"
    while not (path.exists() and path.read_bytes().count(b"\n") > 2):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_plain_process_stops_with_a_checkpoint_and_exit_code_0(
    job: Job, tmp_path: Path, number: signal.Signals
) -> None:
    run = tmp_path / "run"
    with started([sys.executable, str(SCRIPT), *job.flags(run, *LONG)]) as process:
        wait_for_updates(run, process)
        os.killpg(process.pid, number)  # as a terminal and as torchrun do: to the group
        printed, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, printed
    assert f"stopped (signal, {number.name}" in printed
    assert "the same command goes on from here" in printed
    assert (run / "1a" / "latest_checkpointed_iteration.txt").exists()


@pytest.mark.parametrize(
    ("processes", "more"), [pytest.param(1, (), marks=pytest.mark.slow), (2, ("--async-save", "--save-interval", "1"))]
)
def test_torchrun_passes_the_signal_on_and_the_run_goes_on(
    job: Job, finished: Path, tmp_path: Path, processes: int, more: tuple[str, ...]
) -> None:
    """On two ranks a save is under way at nearly every moment. The ranks exit with 0, torchrun itself with 1."""
    run = tmp_path / "run"
    flags = job.flags(run, *more)
    with started(torchrun(str(SCRIPT), *flags, processes=processes)) as process:
        wait_for_updates(run, process)
        os.kill(process.pid, signal.SIGTERM)
        sent = time.monotonic()
        printed, _ = process.communicate(timeout=PATIENCE)
    assert time.monotonic() - sent < GRACE
    assert "stopped (signal, SIGTERM" in printed, printed
    assert "exitcode" not in printed.replace("exitcode  : 0", ""), printed
    assert not list(run.glob("*/*.incomplete"))
    if processes == 1:
        assert job.run(run) == 0
        assert_same_run(run, finished)
        return
    done = run_command(torchrun(str(SCRIPT), *flags, processes=processes))
    assert done.returncode == 0, done.stderr
    assert_close(run, finished)
