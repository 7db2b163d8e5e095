"""One small job, and its uninterrupted run, for all tests of the main job."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.pretrain.job import Job, make_job


@pytest.fixture(scope="session")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return make_job(tmp_path_factory.getbasetemp() / "pretrain_job")


@pytest.fixture(scope="session")
def finished(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of all stages that nobody interrupted. Read only."""
    run = tmp_path_factory.mktemp("finished") / "run"
    assert job.run(run) == 0
    return run
