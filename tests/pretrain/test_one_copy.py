"""A backbone that nothing has trained is its own teacher: one copy of the weights serves both, with the same losses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megabyte_distill.pretrain import stage_runner
from megabyte_distill.runs import kept_backbone, stage_progress
from tests.pretrain.job import Job, metrics, write_teacher

EXACT = ("--byte-targets", "exact", "--2a.exact-targets-from", "teacher", "--train-iters", "2")
FROZEN = (*EXACT, "--freeze-backbone")
ANOTHER = "holds a run of another teacher"


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by a line for each copy of the teacher that is loaded."""
    loaded: list[str] = []
    real = stage_runner.load_teacher_stages

    def load(folder: Path, **options: Any) -> Any:
        loaded.append(folder.name)
        return real(folder, **options)

    monkeypatch.setattr(stage_runner, "load_teacher_stages", load)
    return loaded


def test_a_backbone_frozen_throughout_is_read_as_the_teacher(
    job: Job, tmp_path: Path, copies: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shared, stopped = tmp_path / "shared", tmp_path / "stopped"
    assert job.run(shared, *FROZEN) == 0
    assert job.run(stopped, *FROZEN, "--stages", "1a,1b,1c,2a") == 0
    assert job.run(stopped, *FROZEN, "--stages", "2b", "--exit-interval", "1") == 0
    amid = stage_progress(stopped, "2b")
    assert amid is not None and not amid.is_complete
    again = write_teacher(tmp_path / "again", job.tokenizer)  # the same weights in another folder
    assert job.run(stopped, *FROZEN, "--load", str(again)) == 0
    assert job.run(tmp_path / "next", *FROZEN, "--load", str(shared), "--stages", "2b", "--train-iters", "1") == 0
    assert not copies
    monkeypatch.setattr(stage_runner.StageRunner, "_keeps_backbone", lambda *_: False)
    assert job.run(tmp_path / "copied", *FROZEN) == 0
    assert len(copies) == 4
    assert metrics(shared) == metrics(stopped) == metrics(tmp_path / "copied")


def test_a_trained_backbone_is_no_teacher_for_later_stages(
    job: Job, tmp_path: Path, copies: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert job.run(tmp_path / "run", *EXACT, "--2b.freeze-backbone") == 0
    assert len(copies) == 3  # 1b's own, then 2a's and 2b's
    said = capsys.readouterr().out
    assert "stage 2a: the teacher makes the exact targets; a copy of it is loaded beside the student" in said
    assert job.run(tmp_path / "next", "--load", str(tmp_path / "run"), *FROZEN, "--stages", "2b") == 0
    assert len(copies) == 4


def test_weights_that_were_thawed_or_rounded_once_are_no_teacher(job: Job, tmp_path: Path, copies: list[str]) -> None:
    run, short = tmp_path / "run", ("--train-iters", "1")
    assert job.run(run, *FROZEN, *short, "--stages", "1a,1b") == 0
    assert not copies
    assert job.run(tmp_path / "rounded", *FROZEN, *short, "--load", str(run), "--stages", "2a", "--bf16") == 0
    assert len(copies) == 1
    for iterations, flags in (("2", EXACT), ("3", FROZEN)):
        assert job.run(run, *flags, "--train-iters", iterations, "--stages", "1b", "--no-load-optim") == 0
    assert job.run(run, *FROZEN, *short, "--stages", "2a") == 0
    assert len(copies) == 4


def test_another_teacher_is_refused_and_its_copy_is_not_taken_for_it(
    job: Job, tmp_path: Path, copies: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run, named = tmp_path / "run", tmp_path / "run" / "teacher.json"
    other = write_teacher(tmp_path / "other", job.tokenizer, seed=4)
    assert job.run(run, "--stages", "1a", "--train-iters", "1") == 0
    there, flags = named.read_text(), (*FROZEN, "--stages", "1b,2a", "--train-iters", "1")
    assert job.run(run, "--load", str(other), *flags) == 2
    assert f"--save {run} {ANOTHER}" in capsys.readouterr().err
    assert named.read_text() == there and not (run / "1b").exists()

    named.write_text(json.dumps({**json.loads(there), "teacher": str(other)}))  # its folder has other weights now
    assert job.run(tmp_path / "next", "--load", str(run), *flags) == 2
    assert f"--load {run} {ANOTHER}" in capsys.readouterr().err and not (tmp_path / "next" / "1b").exists()

    named.write_text(json.dumps({"teacher": str(job.teacher)}))  # as an earlier version wrote it
    assert job.run(run, "--load", str(other), *flags) == 0
    assert len(copies) == 2
    assert json.loads(named.read_text()) == {"teacher": str(other), "identity": None}


def test_what_an_earlier_version_said_of_a_backbone_names_no_teacher(tmp_path: Path) -> None:
    (tmp_path / "loop_state.json").write_text('{"keeps_backbone": true}')
    assert kept_backbone(tmp_path) is None
