"""A run's data: opened once, whichever stages read them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from megabyte_distill.config import parse_arguments
from megabyte_distill.data.dataset import ByteTokenDataset
from megabyte_distill.pretrain import run_data
from megabyte_distill.pretrain.prepare import Prepared
from tests.pretrain.job import Job


def test_each_blend_is_opened_once_for_all_stages(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = ("--3a.dialogue-data-path", job.dialogues, "--split", "70,30,0")
    settings = parse_arguments(job.flags(tmp_path / "run", "--stages", "2a,2b,3a", *own))
    open_blend, opened = run_data.open_blend, []

    def counted(data_path: tuple[str, ...], **more: Any) -> Any:
        opened.append(data_path)
        return open_blend(data_path, **more)

    monkeypatch.setattr(run_data, "open_blend", counted)
    prepared = SimpleNamespace(token_bytes=ByteTokenDataset(job.train).table)
    data = run_data.RunData(settings, cast(Prepared, prepared))
    streams = {stage: data.row_streams(stage, config)[0] for stage, config in settings.stages.items()}
    assert data.chunk_sample() and data.shared.held_out.datasets[0].name == job.held_out
    assert sorted(opened) == sorted([(job.train,), (job.held_out,), (job.dialogues,)])
    assert streams["2a"].datasets[0] is streams["2b"].datasets[0] is data.shared.training.datasets[0]
    assert streams["3a"].datasets[0].name == job.dialogues and streams["2a"].seed != streams["2b"].seed
