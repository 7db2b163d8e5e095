"""Two ranks with the same global batch give the losses of one process."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.pretrain.job import SCRIPT, STAGES, Job, assert_same_run, metrics, run_as_ranks, weights

TOLERANCE = 1e-5
FLAGS = ("--global-batch-size", "4")


@pytest.fixture(scope="module")
def alone(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, two micro-batches of two rows an update."""
    run = tmp_path_factory.mktemp("alone") / "run"
    assert job.run(run, *FLAGS, "--micro-batch-size", "2") == 0
    return run


def assert_close(run: Path, alone: Path, stages: Sequence[str] = STAGES) -> None:
    ours, theirs = metrics(run), metrics(alone)
    assert ours.keys() == theirs.keys()
    far = {
        key: (ours[key], theirs[key])
        for key in theirs
        if not math.isclose(ours[key], theirs[key], rel_tol=TOLERANCE, abs_tol=TOLERANCE)
    }
    assert not far, far
    for stage in stages:
        before, after = weights(alone, stage), weights(run, stage)
        distance = max(float((before[name] - after[name]).abs().max()) for name in before)
        assert distance < 1e-4, (stage, distance)


DISTRIBUTED = ("--use-distributed-optimizer", "--overlap-grad-reduce")
# buckets so small that the weights of one layer come in several
GATHERED_LATE = (*DISTRIBUTED, "--overlap-param-gather", "--ddp-bucket-size", "1000", "--check-invariants", "1")


@pytest.mark.parametrize("optimizer", [(), pytest.param(DISTRIBUTED, marks=pytest.mark.slow), GATHERED_LATE])
def test_two_ranks_give_the_losses_of_one(job: Job, alone: Path, tmp_path: Path, optimizer: tuple[str, ...]) -> None:
    run = tmp_path / "run"
    done = run_as_ranks(str(SCRIPT), *job.flags(run, *FLAGS, *optimizer), processes=2)
    assert done.returncode == 0, done.stderr
    assert_close(run, alone)


def test_accumulating_micro_batches_gives_the_losses_of_large_ones(job: Job, alone: Path, tmp_path: Path) -> None:
    assert job.run(tmp_path / "run", *FLAGS, "--micro-batch-size", "1") == 0
    assert_close(tmp_path / "run", alone)


@pytest.mark.parametrize(
    "flags", [pytest.param(("--stages", "1b"), marks=pytest.mark.slow), ("--stages", "2b", "--bf16")]
)
def test_the_distributed_optimizer_resumes_to_the_last_digit(job: Job, tmp_path: Path, flags: tuple[str, ...]) -> None:
    """megatron alone would not: see training/distributed_adam.py."""
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    flags = (*FLAGS, *flags, "--use-distributed-optimizer")
    done = run_as_ranks(str(SCRIPT), *job.flags(straight, *flags), processes=2)
    assert done.returncode == 0, done.stderr
    done = run_as_ranks(str(SCRIPT), *job.flags(stopped, *flags, "--exit-interval", "2"), processes=2)
    assert done.returncode == 0, done.stderr
    assert "stopped (interval)" in done.stdout
    done = run_as_ranks(str(SCRIPT), *job.flags(stopped, *flags), processes=2)
    assert done.returncode == 0, done.stderr
    assert_same_run(stopped, straight, [flags[3]])


def test_the_distributed_optimizer_goes_on_with_fewer_ranks(job: Job, tmp_path: Path) -> None:
    straight, changed = tmp_path / "straight", tmp_path / "changed"
    flags = (*FLAGS, "--stages", "1b", "--use-distributed-optimizer")
    assert job.run(straight, *flags) == 0
    done = run_as_ranks(str(SCRIPT), *job.flags(changed, *flags, "--exit-interval", "2"), processes=2)
    assert done.returncode == 0, done.stderr
    assert job.run(changed, *flags) == 0
    assert_close(changed, straight, ["1b"])


def test_another_kind_of_optimizer_than_the_checkpoints_is_refused(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, flag = tmp_path / "run", "--use-distributed-optimizer"
    assert job.run(run, "--stages", "1a", "--exit-interval", "2", flag) == 0
    assert job.run(run, "--stages", "1a") == 2
    assert "was saved with --use-distributed-optimizer" in (message := capsys.readouterr().err)
    assert "--no-load-optim" in message
    assert job.run(run, "--stages", "1a", "--no-load-optim") == 0


def test_two_ranks_end_with_the_summary_of_one(job: Job, tmp_path: Path) -> None:
    """Checkpoints are loaded collectively: the closing report must not leave a rank behind."""
    summaries = []
    for name, processes in (("two", 2), ("one", 1)):
        flags = job.flags(tmp_path / name, *FLAGS, "--summary-bytes", "1500", "--stages", "2a")
        done = run_as_ranks(str(SCRIPT), *flags, processes=processes, timeout=120)
        assert done.returncode == 0, done.stderr
        summaries.append(json.loads((tmp_path / name / "summary.json").read_text()))
    assert summaries[0]["student_bits_per_byte"] == pytest.approx(summaries[1]["student_bits_per_byte"], abs=1e-4)


def test_two_ranks_make_the_embedded_example_ready_and_train(tmp_path: Path) -> None:
    """A converted teacher is a checkpoint, which all ranks of a job would write together; one process makes it."""
    flags = ("--smoke", "--stages", "1a", "--train-iters", "2", "--eval-iters", "0", "--save", str(tmp_path / "run"))
    done = run_as_ranks(str(SCRIPT), *flags, processes=2, timeout=280)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "teacher" / "model_config.json").exists()
    assert (tmp_path / "run" / "1a" / "iter_0000002").exists()
