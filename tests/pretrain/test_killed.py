"""SIGKILL at random moments, also in the middle of a save: the restarted run ends with the same digits."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.pretrain.job import Job, assert_same_run, run_command


@pytest.mark.parametrize(("kills", "seed", "more"), [(10, 7, ()), (6, 8, ("--async-save",))])
def test_killed_at_random_moments_and_started_again_gives_the_same_digits(
    job: Job, finished: Path, tmp_path: Path, kills: int, seed: int, more: tuple[str, ...]
) -> None:
    run = tmp_path / "run"
    flags = job.flags(run, "--save-interval", "1", *more)
    done = run_command([sys.executable, "-m", "tests.pretrain.killer", str(run), str(kills), str(seed), *flags])
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["exit code"] == 0, done.stderr
    assert len(report["moments"]) == kills, report
    assert "save" in report["moments"], report
    assert not list(run.glob("*/*.incomplete"))
    assert_same_run(run, finished)
