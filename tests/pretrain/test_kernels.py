"""``--kernels`` in the main job: the choice stands in the log once, and a demand that cannot be met ends it."""

from __future__ import annotations

from pathlib import Path

import pytest

from megabyte_distill.kernels import build
from tests.pretrain.job import Job


def test_the_log_names_the_path_once(job: Job, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert job.run(tmp_path / "run", "--kernels", "reference", "--stages", "1a") == 0
    assert capfd.readouterr().out.count("kernels: torch reference (--kernels reference)") == 1


def test_fused_without_a_library_ends_before_training(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build, "library_path", lambda kind: tmp_path / f"{kind}.so")
    assert job.run(tmp_path / "run", "--kernels", "fused", "--stages", "1a") == 2
    assert "--kernels fused: there is no kernel library" in capfd.readouterr().err
    assert not (tmp_path / "run" / "1a").exists()
