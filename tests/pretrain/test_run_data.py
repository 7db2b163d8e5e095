"""A run's data: opened once, whichever stages read them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from megabyte_distill.config import parse_arguments
from megabyte_distill.data.dataset import ByteTokenDataset
from megabyte_distill.pretrain import run_data
from megabyte_distill.pretrain.context import beyond_context
from megabyte_distill.pretrain.prepare import Prepared
from tests.pretrain.job import Job


class Documents:
    """Tokens and bytes of each."""

    def __init__(self, *sizes: tuple[int, int]) -> None:
        self._sizes = sizes

    def __len__(self) -> int:
        return len(self._sizes)

    def num_tokens(self, document: int) -> int:
        return self._sizes[document][0]

    def num_bytes(self, document: int) -> int:
        return self._sizes[document][1]


def test_documents_beyond_the_teachers_positions_are_told() -> None:
    sets = cast(Any, [Documents((10, 40), (0, 0)), Documents((300, 1000), (100, 400))])
    assert beyond_context(sets, 2048, 301) is None  # with the position of its start
    told = beyond_context(sets, 2048, 300)
    assert told is not None and "documents of 300 tokens" in told and "--seq-length of 996 cuts" in told
    told = beyond_context(sets, 500, 100)  # half of the longest
    assert told is not None and "rows of 500 bytes hold documents of 150 tokens" in told and "of 330 cuts" in told
    assert beyond_context([], 2048, 2) is None


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
