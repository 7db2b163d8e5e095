"""The main job over pipeline stages: the curriculum, its summary, checkpoints that other cuts read, a killed run."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.distributed.test_data_parallel import FLAGS, assert_close
from tests.pretrain.job import (
    SCRIPT,
    Job,
    assert_same_run,
    environment,
    run_as_ranks,
    torchrun,
    write_teacher,
)

PIPELINE = ("--pipeline-model-parallel-size", "2")
VIRTUAL = (*PIPELINE, "--num-layers-per-virtual-pipeline-stage", "1")
BOTH = (*PIPELINE, "--tensor-model-parallel-size", "2", "--sequence-parallel")
LAST_STAGE = ("--stages", "2b", *FLAGS)


def run_on(job: Job, run: Path, ranks: int, *flags: str) -> None:
    done = run_as_ranks(str(SCRIPT), *job.flags(run, *flags), processes=ranks, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]


def test_the_curriculum_on_two_stages_is_that_of_one_process(job: Job, tmp_path: Path) -> None:
    alone, run = tmp_path / "alone", tmp_path / "run"
    flags = (*FLAGS, "--summary-bytes", "1500", "--2b.byte-targets", "exact", "--2b.boundary-source", "router")
    assert job.run(alone, *flags) == 0
    run_on(job, run, 2, *flags, *PIPELINE)
    assert_close(run, alone)
    summaries = [json.loads((path / "summary.json").read_text()) for path in (run, alone)]
    two, one = ({k: v for k, v in s.items() if isinstance(v, float) and k != "seconds"} for s in summaries)
    assert two.keys() == one.keys() and len(one) > 10
    assert two == pytest.approx(one, abs=1e-4, nan_ok=True)


@pytest.mark.parametrize("first", ["one rank", "four ranks"])
def test_a_run_goes_on_at_another_cut(job: Job, tmp_path: Path, first: str) -> None:
    """Weights and optimizer, written at TP1 PP1 and read at TP2 x PP2 + SP, or the other way round."""
    straight, changed = tmp_path / "straight", tmp_path / "changed"
    assert job.run(straight, *LAST_STAGE) == 0
    if first == "one rank":
        assert job.run(changed, *LAST_STAGE, "--exit-interval", "2") == 0
        run_on(job, changed, 4, *LAST_STAGE, *BOTH)
    else:
        run_on(job, changed, 4, *LAST_STAGE, *BOTH, "--exit-interval", "2")
        assert job.run(changed, *LAST_STAGE) == 0
    assert_close(changed, straight, ["2b"])


@pytest.fixture(scope="module")
def deep(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A teacher of four layers, which two ranks' two virtual stages divide."""
    folder = tmp_path_factory.mktemp("deep") / "teacher"
    return replace(job, teacher=write_teacher(folder, job.tokenizer, layers=4))


def test_a_run_goes_into_virtual_stages_and_comes_back(deep: Job, tmp_path: Path) -> None:
    """Weights and optimizer, from one rank to PP2 x VPP2 and from there to one rank."""
    straight, changed = tmp_path / "straight", tmp_path / "changed"
    stage = (*LAST_STAGE, "--check-invariants", "1")
    assert deep.run(straight, *stage) == 0
    assert deep.run(changed, *stage, "--exit-interval", "1") == 0
    run_on(deep, changed, 2, *stage, *VIRTUAL, "--exit-interval", "3")
    assert deep.run(changed, *stage) == 0
    assert_close(changed, straight, ["2b"])


@pytest.mark.slow
def test_the_curriculum_in_virtual_stages_is_that_of_one_process(deep: Job, tmp_path: Path) -> None:
    alone, run = tmp_path / "alone", tmp_path / "run"
    flags = (*FLAGS, "--summary-bytes", "1500", "--2b.byte-targets", "exact", "--check-invariants", "1")
    assert deep.run(alone, *flags) == 0
    run_on(deep, run, 2, *flags, *VIRTUAL)
    assert_close(run, alone)
    assert (run / "summary.json").exists()


def _kill_behind(job: Job, run: Path, iteration: int, *flags: str) -> None:
    """Start four ranks and kill the whole job once a checkpoint of ``iteration`` is complete."""
    command = torchrun(str(SCRIPT), *job.flags(run, *flags), processes=4)
    process = subprocess.Popen(
        command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    tracker, deadline = run / "2b" / "latest_checkpointed_iteration.txt", time.monotonic() + 200
    while not (tracker.exists() and int(tracker.read_text()) >= iteration):
        assert process.poll() is None and time.monotonic() < deadline, "ended before its checkpoint"
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.slow
def test_twenty_updates_killed_and_resumed(job: Job, tmp_path: Path) -> None:
    """Killed at TP2 x PP2: at the same cut the rest is the same to the last digit, at DP4 within 1e-5."""
    straight, same, other = (tmp_path / name for name in ("straight", "same", "other"))
    stage = (*LAST_STAGE, "--train-iters", "20", "--save-interval", "4", "--eval-interval", "10")
    run_on(job, straight, 4, *stage, *BOTH)
    _kill_behind(job, same, 8, *stage, *BOTH)
    subprocess.run(["cp", "-r", str(same), str(other)], check=True)
    run_on(job, same, 4, *stage, *BOTH)
    assert_same_run(same, straight, ["2b"])
    run_on(job, other, 4, *stage)
    assert_close(other, straight, ["2b"])


@pytest.mark.parametrize("stage", ["1b", "2a"])
def test_a_bf16_run_goes_on_where_a_pipeline_stage_trains_less(job: Job, tmp_path: Path, stage: str) -> None:
    """Without the distributed optimizer: in 1b the last stage trains the backbone alone, in 2a the first nothing."""
    straight, changed = tmp_path / "straight", tmp_path / "changed"
    flags = ("--stages", stage, *FLAGS, *PIPELINE, "--bf16")
    run_on(job, straight, 2, *flags)
    run_on(job, changed, 2, *flags, "--exit-interval", "2")
    run_on(job, changed, 2, *flags)
    assert_same_run(changed, straight, [stage])


@pytest.mark.parametrize("stage", [pytest.param("1a", marks=pytest.mark.slow), "2a"])
def test_the_distributed_optimizer_goes_on_where_a_pipeline_stage_trains_nothing(
    job: Job, tmp_path: Path, stage: str
) -> None:
    straight, changed = tmp_path / "straight", tmp_path / "changed"
    flags = ("--stages", stage, *FLAGS, *PIPELINE, "--use-distributed-optimizer")
    run_on(job, straight, 4, *flags)
    run_on(job, changed, 4, *flags, "--exit-interval", "2")
    run_on(job, changed, 4, *flags)
    assert_same_run(changed, straight, [stage])


def test_weights_that_are_not_finite_on_the_last_stage_are_named_by_the_first(job: Job, tmp_path: Path) -> None:
    overflow = ("--2a.lr", "3e37", "--2a.weight-decay", "11")  # a product with 3.3e38, the largest that fp32 holds
    flags = job.flags(tmp_path / "run", "--stages", "2a", *PIPELINE, "--save-interval", "1", *overflow)
    done = run_as_ranks(str(SCRIPT), *flags, processes=2)
    assert done.returncode != 0
    # the first stage's own line
    assert re.search(r"(?m)^error: stage 2a: \d+ weights are NaN .*\(byte_decoder\.", done.stderr), done.stderr


def test_stages_that_do_not_divide_the_layers_are_refused(job: Job, tmp_path: Path) -> None:
    flags = job.flags(tmp_path / "run", "--pipeline-model-parallel-size", "3")
    done = run_as_ranks(str(SCRIPT), *flags, processes=3)
    assert done.returncode != 0
    assert "layers 2 is not divisible by --pipeline-model-parallel-size 3" in done.stderr


def test_parts_of_a_row_that_tensor_parallel_ranks_cannot_share_are_refused(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert job.run(tmp_path / "run", *BOTH, "--seq-length", "257") == 2
    assert "--micro-batch-size × --seq-length = 257 bytes in parts" in capsys.readouterr().err
