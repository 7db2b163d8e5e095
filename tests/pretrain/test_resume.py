"""A stopped run goes on, and ends as if it had never been stopped."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from megabyte_distill.runs import chunk_limit
from tests.pretrain.job import STAGES, Job, assert_same_run, metrics, write_data


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


def test_a_second_run_gives_the_same_digits(job: Job, finished: Path, run: Path) -> None:
    assert job.run(run) == 0
    assert_same_run(run, finished)


@pytest.mark.parametrize("more", [(), ("--async-save",)])
def test_stopping_at_every_interval_changes_nothing(
    job: Job, finished: Path, run: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...]
) -> None:
    for _ in range(2 * len(STAGES)):
        assert job.run(run, "--exit-interval", "3", *more) == 0
        printed = capsys.readouterr().out
        if "stopped (interval)" not in printed:
            break
    else:
        pytest.fail("the run never came to its end")
    assert_same_run(run, finished)


def test_a_finished_run_is_left_as_it_is(job: Job, finished: Path, run: Path) -> None:
    shutil.copytree(finished, run)
    before = {path: path.stat().st_mtime_ns for path in run.glob("*/iter_*/*")}
    assert job.run(run) == 0
    assert {path: path.stat().st_mtime_ns for path in run.glob("*/iter_*/*")} == before


def test_averages_over_a_log_interval_survive_a_stop_inside_it(job: Job, run: Path, tmp_path: Path) -> None:
    flags = ("--stages", "1a", "--log-interval", "4")
    assert job.run(tmp_path / "whole", *flags) == 0
    assert job.run(run, *flags, "--exit-interval", "3") == 0
    assert job.run(run, *flags) == 0
    assert metrics(run) == metrics(tmp_path / "whole")


LOSSES = ("--align-layers", "2", "--byte-targets", "mixed", "--kd-temperature", "2")


@pytest.mark.parametrize(
    ("parts", "stages"),
    [
        (("--byte-mixer", "mamba2", *LOSSES), STAGES),
        (("--byte-mixer", "local_attention", "--router", "linear"), ("1c", "2b")),
    ],
)
def test_other_parts_losses_and_bf16_resume_exactly(
    job: Job, run: Path, tmp_path: Path, parts: tuple[str, ...], stages: tuple[str, ...]
) -> None:
    flags = (*parts, "--bf16", "--stages", ",".join(stages))
    assert job.run(tmp_path / "whole", *flags) == 0
    while any(not (run / stage / "iter_0000004").exists() for stage in stages):
        assert job.run(run, *flags, "--exit-interval", "3") == 0
    assert_same_run(run, tmp_path / "whole", stages)


def test_growing_chunks_go_on_where_they_were(
    job: Job, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--stages", "1c,2a", "--byte-targets", "exact", "--target-bytes-per-chunk", "9")
    flags += ("--target-bytes-per-chunk-iters", "4")
    assert job.run(tmp_path / "whole", *flags) == 0
    assert "stage 2a merges tokens of " in capsys.readouterr().out
    for _ in range(4):
        assert job.run(run, *flags, "--exit-interval", "3") == 0
    assert metrics(run) == metrics(tmp_path / "whole")
    assert [chunk_limit(run / "2a" / f"iter_000000{n}") for n in (2, 4)] == [
        chunk_limit(tmp_path / "whole" / "2a" / f"iter_000000{n}") for n in (2, 4)
    ]
    limits = [chunk_limit(run / stage / "iter_0000004") for stage in ("1c", "2a")]
    assert limits[0] == limits[1] is not None
    lengths = [metrics(run)["2a", update, "bytes per chunk"] for update in (2, 3, 4)]
    assert lengths == sorted(lengths) and lengths[0] + 1 < lengths[-1]


def test_a_stage_whose_base_was_trained_further_is_refused(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert job.run(run, "--stages", "1a,1b") == 0
    assert job.run(run, "--stages", "1a", "--1a.train-iters", "6") == 0
    assert job.run(run, "--stages", "1b") == 2
    message = capsys.readouterr().err
    assert "stage 1b was built on 1a at iteration 4, which is at 6 now" in message


def test_a_stage_left_open_cannot_be_cut_short_behind_itself(
    job: Job, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert job.run(run, "--stages", "1a", "--exit-interval", "3") == 0
    assert job.run(run, "--1a.train-iters", "3") == 2
    assert "stage 1a was left at iteration 3 of 4, and --train-iters 3 is not beyond it" in capsys.readouterr().err


def test_a_position_in_other_data_of_the_same_size_is_refused(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert job.run(run, "--stages", "1a", "--exit-interval", "2") == 0
    other = write_data(tmp_path / "other", job.tokenizer, seed=9, documents=16)
    assert job.run(run, "--stages", "1a", "--train-data-path", other) == 2
    assert "data: saved" in capsys.readouterr().err


def test_a_setting_changed_in_the_middle_of_a_stage_is_said(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert job.run(run, "--stages", "1a", "--exit-interval", "2") == 0
    assert job.run(run, "--stages", "1a", "--lr", "1e-4") == 0
    assert "changed since that checkpoint: 1a.lr" in capsys.readouterr().out


def test_a_run_that_keeps_its_last_checkpoint_alone_goes_on_from_it(job: Job, finished: Path, run: Path) -> None:
    flags = ("--keep-last-checkpoints", "1")
    assert job.run(run, *flags, "--exit-interval", "3") == 0
    assert job.run(run, *flags) == 0
    assert_same_run(run, finished)
    assert [path.name for stage in STAGES for path in (run / stage).glob("iter_*")] == ["iter_0000004"] * len(STAGES)
