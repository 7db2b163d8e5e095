"""One file, three ways to start it; its flags; and what a wrong one says."""

from __future__ import annotations

import ast
import json
import os
import runpy
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from megabyte_distill.conversion.teacher_folder import load_teacher_stages
from megabyte_distill.pretrain import stage_runner
from megabyte_distill.pretrain.main import main
from tests.pretrain.job import SCRIPT, Job, assert_same_run, environment, metrics, run_command, torchrun, weights

SHORT = ("--stages", "1a", "--train-iters", "2")


def test_the_script_is_valid_bash_and_valid_python() -> None:
    done = subprocess.run(["bash", "-n", str(SCRIPT)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    ast.parse(SCRIPT.read_text())


def test_importing_the_script_again_trains_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = runpy.run_path(str(SCRIPT), run_name="__mp_main__")
    assert "main" not in names
    assert not list(tmp_path.iterdir())


def test_torchrun_gives_the_run_of_the_function(job: Job, finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = run_command(torchrun(str(SCRIPT), *job.flags(run)))
    assert done.returncode == 0, done.stderr
    assert_same_run(run, finished)
    noise = [line for line in done.stderr.splitlines() if "Warning" in line]
    assert not noise, noise


def test_bash_starts_as_many_ranks_as_asked_for(job: Job, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = subprocess.run(
        ["bash", str(SCRIPT), *job.flags(run, *SHORT)],
        capture_output=True, text=True, env=environment(GPUS="2"), cwd=tmp_path, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert ("1a", 2, "alignment mse") in metrics(run)
    assert done.stdout.count("iteration       2/      2") == 1, "only the main rank writes the log"


def test_an_unknown_flag_is_said_last_and_exits_with_an_error(tmp_path: Path) -> None:
    done = run_command(torchrun(str(SCRIPT), "--save", str(tmp_path / "run"), "--trian-iters", "3", processes=2))
    assert done.returncode != 0
    assert "did you mean --train-iters?" in done.stderr
    assert "did you mean --train-iters?" in done.stderr[-900:]
    assert not (tmp_path / "run").exists()


def test_flags_of_all_stages_and_of_one(job: Job, tmp_path: Path) -> None:
    run = tmp_path / "run"
    flags = ("--train-iters", "1", "--lr", "3e-3", "--2a.lr", "5e-3", "--lr-warmup-fraction", "0", "--eval-iters", "0")
    assert job.run(run, *flags) == 0
    rates = {stage: value for (stage, _, name), value in metrics(run).items() if name == "learning rate"}
    # 2b's backbone has its own, lower one: the line shows the highest
    assert rates == {"1a": 3e-3, "1b": 3e-3, "1c": 3e-3, "2a": 5e-3, "2b": 3e-3}
    stored = json.loads((run / "2a" / "iter_0000001" / "run_config.yaml").read_text())
    assert "0.005" in json.dumps(stored)


@pytest.mark.parametrize("layers", [0, 1])
def test_1a_on_a_run_reads_no_more_of_the_teacher_than_it_compares_with(
    job: Job, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layers: int
) -> None:
    read: list[set[str]] = []

    def load(*arguments: Any, **options: Any) -> Any:
        teacher = load_teacher_stages(*arguments, **options)
        whole = dict(load_teacher_stages(*arguments, **{**options, "first_layers": None}).named_parameters())
        assert all(torch.equal(parameter, whole[name]) for name, parameter in teacher.named_parameters())
        read.append({name for name, _ in teacher.named_parameters()})
        return teacher

    monkeypatch.setattr(stage_runner, "load_teacher_stages", load)
    run, flags = tmp_path / "run", ("--load", str(finished), "--align-layers", str(layers))
    assert job.run(run, *SHORT, *flags) == 0
    (names,) = read
    assert {".".join(name.split(".")[:3]) for name in names} == {
        "embedding.weight",
        *(f"decoder.layers.{n}" for n in range(layers)),
    }
    assert (("1a", 2, "layers mse relative") in metrics(run)) == (layers > 0)


@pytest.mark.parametrize("rank", [0, 1])
def test_help_is_printed_by_rank_0_and_all_exit_0(
    rank: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", str(rank))
    with pytest.raises(SystemExit) as leaving:
        main(["--help"])
    assert leaving.value.code == 0
    assert ("--global-batch-size" in capsys.readouterr().out) == (rank == 0)


def test_a_flag_without_effect_is_warned_of(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert job.run(tmp_path / "run", *SHORT, "--2a.lr", "1") == 0
    assert "--2a.lr has no effect" in capsys.readouterr().err


def test_mock_data_needs_no_files(job: Job, tmp_path: Path) -> None:
    flags = job.flags(tmp_path / "run", *SHORT)
    for name in ("--train-data-path", "--valid-data-path"):
        place = flags.index(name)
        del flags[place : place + 2]
    assert main([*flags, "--mock-data"]) == 0


def test_a_run_goes_on_from_the_last_stage_of_another_run(job: Job, finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert job.run(run, "--load", str(finished), "--stages", "2b", "--train-iters", "2") == 0
    assert (run / "2b" / "iter_0000002").is_dir()
    assert not (run / "1a").exists()


FROM_STEP_2 = ("--stages", "2b", "--lr", "0", "--backbone-lr", "0", "--train-iters", "2", "--ckpt-step", "2")


def test_a_run_starts_from_the_step_that_is_asked_for(
    job: Job, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    command = ("--load", str(finished), *FROM_STEP_2)
    for words in (command, command[:-2]):
        assert job.run(run, *words, "--exit-interval", "1") == 0
    for load in (str(finished), f"{finished}/", os.path.relpath(finished)):
        assert job.run(run, "--load", load, *FROM_STEP_2) == 0, "the same command goes on, however the run is called"
    got, asked, latest = weights(run, "2b"), weights(finished, "2b", 2), weights(finished, "2b")
    assert all(torch.equal(got[name], asked[name]) for name in asked)
    assert not all(torch.equal(got[name], latest[name]) for name in latest)
    capsys.readouterr()
    for words in (("--ckpt-step", "4"), ("--load", str(run))):
        assert job.run(run, *command, *words) == 2
        assert "holds stage 2b already, on which the next ones build" in capsys.readouterr().err


def test_a_step_that_no_stage_would_start_from_is_refused(
    job: Job, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    for words, message in (
        ((), "is a teacher, which has one checkpoint; leave --ckpt-step out"),
        (("--load", str(run)), f"--ckpt-step 2: --save {run} holds stage 1a already"),
        (("--load", str(finished)), f"--ckpt-step 2: --save {run} holds stage 1a already"),
        (("--load", str(finished), "--ckpt-step", "3", "--fresh"), "iter_0000003 is missing"),
    ):
        assert job.run(run, *FROM_STEP_2, *words) == 2
        assert message in capsys.readouterr().err
    assert (run / "1a").is_dir(), "nothing is removed before all is known to be well"


def test_fresh_starts_over(job: Job, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert job.run(run, *SHORT, "--lr", "1e-3") == 0
    before = metrics(run)
    assert job.run(run, *SHORT, "--lr", "2e-3", "--byte-width", "48", "--fresh") == 0
    assert metrics(run).keys() == before.keys()
    assert metrics(run) != before
