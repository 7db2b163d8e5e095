"""A backbone that nothing has trained is its own teacher: one copy of the weights serves both, with the same losses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megabyte_distill.pretrain import stage_runner
from tests.pretrain.job import TIMES, Job

EXACT = ("--byte-targets", "exact", "--2a.exact-targets-from", "teacher", "--train-iters", "2")


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


def losses(run: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{name: value for name, value in record.items() if name not in TIMES} for record in records]


def test_a_backbone_frozen_throughout_is_read_as_the_teacher(
    job: Job, tmp_path: Path, copies: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert job.run(tmp_path / "shared", *EXACT, "--freeze-backbone") == 0
    assert not copies
    # stopped amid 2b, and in another call
    assert job.run(tmp_path / "stopped", *EXACT, "--freeze-backbone", "--2b.train-iters", "1") == 0
    assert job.run(tmp_path / "stopped", *EXACT, "--freeze-backbone", "--stages", "2b") == 0
    assert not copies
    monkeypatch.setattr(stage_runner.StageRunner, "_keeps_backbone", lambda *_: False)
    assert job.run(tmp_path / "copied", *EXACT, "--freeze-backbone") == 0
    assert len(copies) == 4
    assert losses(tmp_path / "shared") == losses(tmp_path / "copied")


def test_a_trained_backbone_is_no_teacher_for_later_stages(job: Job, tmp_path: Path, copies: list[str]) -> None:
    assert job.run(tmp_path / "run", *EXACT, "--2b.freeze-backbone") == 0
    assert len(copies) == 3  # 1b's own, then 2a's and 2b's
    assert (
        job.run(tmp_path / "next", "--load", str(tmp_path / "run"), *EXACT, "--freeze-backbone", "--stages", "2b") == 0
    )
    assert len(copies) == 4
