"""3a in a run: behind the five stages, resumed, refused where the data have no mask, and what it leaves speaks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from megabyte_distill.curriculum.dialogue_sft import MEASURE
from megabyte_distill.pretrain.main import main
from megabyte_distill.runs import chunk_limit, last_stage
from tests.pretrain.job import STAGES, Job, assert_same_run, metrics
from tools.generate import main as generate

SIX = ",".join((*STAGES, "3a"))


@pytest.fixture
def behind(finished: Path, tmp_path: Path) -> Path:
    """A run whose five stages are complete."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_six_stages_are_five_and_one(
    job: Job, finished: Path, behind: Path, tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    flags = ("--stages", SIX, "--3a.dialogue-data-path", job.dialogues, "--split", "70,30,0", "--summary-bytes", "1500")
    assert job.run(behind, *flags) == 0
    out = capsysbinary.readouterr().out.decode()
    assert "stage 2b (byte SFT, everything) is complete at iteration 4: skipped" in out
    assert "stage 3a (byte SFT, dialogues) starts from stage 2b" in out
    row = next(line for line in out.splitlines() if line.startswith("3a "))
    assert MEASURE in row and row.rstrip().endswith("–"), "answers' bits per byte stand beside no others"
    found, before = metrics(behind), metrics(finished)
    assert {key: value for key, value in found.items() if key[0] != "3a"} == before
    assert found["3a", 4, f"validation {MEASURE}"] > 0 and found["3a", 4, "byte ce"] < found["3a", 1, "byte ce"]
    assert last_stage(behind).stage == "3a"
    assert json.loads((behind / "summary.json").read_text())["bytes_per_stage"]["3a"] == 4 * 2 * 256

    again = Path(shutil.copytree(finished, tmp_path / "again"))
    for _ in range(2):  # killed at its second update, then to the end
        assert job.run(again, *flags[:-2], "--3a.save-interval", "2", "--exit-interval", "2") == 0
    assert_same_run(again, behind, ["3a"])
    capsysbinary.readouterr()
    prompt = "<|im_start|>user\nthe old house<|im_end|>\n<|im_start|>assistant\n"
    assert generate(["--load", str(behind), "--prompt", prompt, "--max-new-bytes", "5"]) == 0
    assert capsysbinary.readouterr().out.startswith(prompt.encode())


def test_the_runs_own_data_may_be_the_dialogues(job: Job, behind: Path) -> None:
    """Of a call that trains 3a alone; without a training set and a held-out one apart."""
    own = ("--train-data-path", job.dialogues, "--valid-data-path", job.dialogues)
    assert job.run(behind, *own, "--stages", "3a", "--train-iters", "1") == 0
    assert metrics(behind)["3a", 1, f"validation {MEASURE}"] > 0


def test_chunks_stay_as_long_as_the_stage_before_left_them(job: Job, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert job.run(run, "--stages", "2a", "--target-bytes-per-chunk", "8", "--train-iters", "1") == 0
    merged = chunk_limit(last_stage(run).checkpoint)
    assert merged is not None
    for iterations in ("1", "2"):
        flags = ("--stages", "3a", "--3a.dialogue-data-path", job.dialogues, "--split", "70,30,0")
        assert job.run(run, *flags, "--train-iters", iterations) == 0
        assert last_stage(run).stage == "3a" and chunk_limit(last_stage(run).checkpoint) == merged
    assert job.run(tmp_path / "own", *flags, "--load", str(run), "--3a.target-bytes-per-chunk", "5") == 0
    assert chunk_limit(last_stage(tmp_path / "own").checkpoint) not in (merged, None)


@pytest.mark.parametrize("flags", [(), ("--dialogue-data-path", "{train}", "--split", "70,30,0")])
def test_text_without_a_mask_is_refused_before_any_stage(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...]
) -> None:
    words = [flag.format(train=job.train) for flag in flags]
    assert job.run(tmp_path / "run", "--stages", "2b,3a", *words) == 2
    message = capsys.readouterr().err
    assert f"{job.train} has no loss mask" in message and "--3a.dialogue-data-path" in message
    assert not (tmp_path / "run" / "2b").exists()


def test_random_bytes_have_a_mask(job: Job, tmp_path: Path) -> None:
    """To try a machine."""
    flags = job.flags(tmp_path / "run", "--stages", "3a", "--train-iters", "2")
    place = flags.index("--train-data-path")
    assert flags[place + 2] == "--valid-data-path"
    assert main([*flags[:place], "--mock-data", *flags[place + 4 :]]) == 0
