"""The scripts that start a run: valid bash, the recipe's numbers, and what they would need."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest

from megabyte_distill.config import StageConfig, parse_arguments
from megabyte_distill.config.run_config import settings_from_dict
from tests.pretrain.conftest import job
from tests.pretrain.job import STAGES, Job, environment
from tests.pretrain.test_dry_run import printed_settings

__all__ = ["job"]
ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
MODELS = {
    "llama3.2_3b.sh": "llama3.2-3b", "qwen3_4b.sh": "qwen3-4b", "olmo2_1b.sh": "olmo2-1b", "gemma3_1b.sh": "gemma3-1b",
}  # fmt: skip
RECIPE = (
    *("train_iters", "seq_length", "micro_batch_size", "global_batch_size", "lr", "backbone_peak_lr", "floor_ratio"),
    *("warmup_iterations", "weight_decay", "clip_grad", "adam_beta1", "adam_beta2", "lr_decay_style"),
    "router_loss_weight",
)


def bash(script: str, *words: str, folder: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(EXAMPLES / script), *words],
        capture_output=True, text=True, timeout=240, env=environment(**variables), cwd=folder, check=False,
    )  # fmt: skip


def recipe_of(config: StageConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in RECIPE}


@pytest.mark.parametrize("path", sorted([*EXAMPLES.glob("*.sh"), *EXAMPLES.glob("slurm/*")]), ids=lambda p: p.name)
def test_every_script_is_valid_bash(path: Path) -> None:
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "script",
    [
        "llama3.2_3b.sh",
        pytest.param("qwen3_4b.sh", marks=pytest.mark.slow),
        "olmo2_1b.sh",
        pytest.param("gemma3_1b.sh", marks=pytest.mark.slow),
    ],
)
def test_a_model_script_has_the_papers_numbers(script: str, tmp_path: Path) -> None:
    """Those of --preset official, in each of the five stages, from any folder it is called in."""
    # long scan blocks are quicker to reckon with; memory is looked at in one script
    faster = [] if script == "olmo2_1b.sh" else ["--mamba-scan-chunk", "16384"]
    done = bash(script, *faster, DRY_RUN="1", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    found = settings_from_dict(printed_settings(done.stdout)["settings"])
    paper = parse_arguments(["--mock-data", "--preset", "official"], world_size=8)
    assert list(found.stages) == list(STAGES)
    for stage, config in found.stages.items():
        assert recipe_of(config) == recipe_of(paper.stages[stage]), stage
    assert found.model.preset == MODELS[script] and found.run.bf16
    assert "8 ranks = tensor 1 × pipeline 1 × data 8" in done.stdout
    largest = float(done.stdout.split("largest: ")[1].split(" GiB")[0])
    assert faster or 10 < largest < 72, "it should fit into 80 GB with room to spare"


def test_flags_behind_a_script_win_and_sizes_come_from_the_environment() -> None:
    flags = ("--stages", "1b", "--1b.lr", "1e-5", "--1b.seq-length", "1024")
    done = bash(
        "olmo2_1b.sh", *flags, DRY_RUN="1", TP="2", PP="2", GPUS_PER_NODE="4", NUM_NODES="2", DATA_PATH="0.7 a 0.3 b"
    )
    assert done.returncode == 0, done.stderr
    settings = settings_from_dict(printed_settings(done.stdout)["settings"])
    assert settings.stages["1b"].lr == 1e-5 and settings.data.data_path == ("0.7", "a", "0.3", "b")
    assert settings.parallel.sequence_parallel
    assert "8 ranks = tensor 2 × pipeline 2 × data 2" in done.stdout


def test_the_slurm_script_starts_one_task_a_machine(tmp_path: Path) -> None:
    """With stand-ins for Slurm's own commands: the first host is the meeting point, the flags arrive."""
    (tmp_path / "scontrol").write_text("#!/bin/bash\nprintf 'node7\\nnode8\\n'\n")
    (tmp_path / "srun").write_text('#!/bin/bash\necho "met at $RDZV_ENDPOINT as $RDZV_ID"\nshift\nexec "$@"\n')
    for name in ("scontrol", "srun"):
        (tmp_path / name).chmod(0o755)
    done = bash(
        "slurm/pretrain.sbatch", "--stages", "1b", "--1b.seq-length", "1024",
        PATH=f"{tmp_path}{os.pathsep}{environment()['PATH']}", DRY_RUN="1", SCRIPT="examples/olmo2_1b.sh", MINUTES="7",
        SLURM_SUBMIT_DIR=str(ROOT), SLURM_JOB_NODELIST="node[7-8]", SLURM_JOB_NUM_NODES="2", SLURM_JOB_ID="31",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "met at node7:29400 as 31" in done.stdout
    settings = settings_from_dict(printed_settings(done.stdout)["settings"])
    assert settings.run.exit_duration_in_mins == 7 and list(settings.stages) == ["1b"]
    assert "16 ranks" in done.stdout


@pytest.mark.parametrize(
    ("variables", "words", "expected"),
    [
        ({"RDZV_ENDPOINT": "a:1"}, ["examples/olmo2_1b.sh"], "how many machines take part"),
        ({"NUM_NODES": "2"}, ["examples/olmo2_1b.sh"], "host:port of one of the machines"),
        ({"NUM_NODES": "2", "RDZV_ENDPOINT": "a:1"}, [], "expected the script to run"),
        ({"NUM_NODES": "2", "RDZV_ENDPOINT": "a:1", "TP": "3"}, ["x"], "TP=3 does not divide GPUS_PER_NODE=8"),
    ],
)
def test_several_machines_need_to_be_told_where_they_meet(
    variables: dict[str, str], words: list[str], expected: str
) -> None:
    done = bash("multi_node.sh", *words, **variables)
    assert done.returncode != 0 and expected in done.stderr


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port: int = probe.getsockname()[1]
        return port


def test_two_machines_of_one_rank_train_one_model(job: Job, tmp_path: Path) -> None:
    run = tmp_path / "run"
    small = job.flags(run, "--stages", "1a", "--preset", "tiny", "--no-bf16")
    small += ["--1a.seq-length", "256", "--1a.global-batch-size", "2", "--train-iters", "2", "--split", "80,20,0"]
    for flag in ("--train-data-path", "--valid-data-path"):
        place = small.index(flag)
        del small[place : place + 2]
    variables = {
        "NUM_NODES": "2", "RDZV_ENDPOINT": f"localhost:{free_port()}", "RDZV_ID": "test", "GPUS_PER_NODE": "1",
        "DATA_PATH": job.train,
    }  # fmt: skip
    machines = [
        subprocess.Popen(
            ["bash", str(EXAMPLES / "multi_node.sh"), "examples/olmo2_1b.sh", *small],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(**variables), cwd=ROOT,
        )
        for _ in range(2)
    ]  # fmt: skip
    answers = [machine.communicate(timeout=200) for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], answers
    lines = [line for out, _ in answers for line in out.splitlines() if "iteration       2/      2" in line]
    assert len(lines) == 1, "one of two ranks writes the log"
    state = json.loads((run / "1a" / "iter_0000002" / "loop_state.json").read_text())
    assert state["progress"]["consumed_rows"] == 4


def test_the_harness_script_says_what_it_would_start() -> None:
    done = bash("lm_eval.sh", "--limit", "9", DRY_RUN="1", STUDENT="RUN", TEACHER="DIR", ZERO_SHOT="piqa", INCLUDE="T")
    assert (done.returncode, done.stderr) == (0, "")
    student, teacher, *five = done.stdout.splitlines()
    assert (
        "megabyte_distill.harness --model megabyte --model_args path=RUN,paths=4 --tasks piqa --num_fewshot 0"
        in student
    )
    assert "lm_eval --model hf --model_args pretrained=DIR --tasks piqa --num_fewshot 0" in teacher
    assert len(five) == 2 and all("--tasks mmlu --num_fewshot 5" in line for line in five)
    assert all(line.endswith("--include_path T --limit 9") for line in (student, teacher, *five))
    only = bash("lm_eval.sh", DRY_RUN="1", STUDENT="RUN", FIVE_SHOT="").stdout.splitlines()
    assert len(only) == 1 and "hellaswag" in only[0]
    assert bash("lm_eval.sh", DRY_RUN="1").returncode == 2
