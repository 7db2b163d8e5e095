"""Where ranks are: what is written is read, also half written, and who is behind is told by the order of an update."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist

from megabyte_distill.parallel.positions import ENDED, Position, Record, furthest_behind, read_positions, table
from megabyte_distill.parallel.watch import is_lost_contact
from megabyte_distill.training.failures import TrainingFailure


def at(stage: str, iteration: int, phase: str, micro_batch: int = -1, outcome: str = "") -> Record:
    return Record(stage=stage, iteration=iteration, phase=phase, micro_batch=micro_batch, outcome=outcome)


IN_ORDER = [
    at("", 0, "start"),
    at("1a", 0, "load"),
    at("1a", 3, "data"),
    at("1a", 3, "count"),
    at("1a", 3, "forward", 0),
    at("1a", 3, "backward", 0),
    at("1a", 3, "forward", 1),
    at("1a", 3, "backward", 1),
    at("1a", 3, "reduce"),
    at("1a", 3, "step"),
    at("1a", 3, "evaluate"),
    at("1a", 3, "save"),
    at("1a", 4, "data"),
    at("1b", 0, "load"),
]


def test_later_parts_of_a_run_count_as_further() -> None:
    progress = [record.progress for record in IN_ORDER]
    assert progress == sorted(progress) and len(set(progress)) == len(progress)


def test_the_one_behind_is_named_unless_it_has_ended() -> None:
    early, late = IN_ORDER[2], IN_ORDER[8]
    assert furthest_behind({0: late, 1: early, 2: late}) == [1]
    assert furthest_behind({0: late, 1: late}) == []
    assert furthest_behind({0: late, 1: at("1a", 2, "data", outcome=ENDED)}) == []
    assert furthest_behind({}) == []


def test_what_is_written_is_read_and_what_is_not_there_is_missing(tmp_path: Path) -> None:
    position = Position(tmp_path, 1)
    position.begin("2b", 12, "data")
    position.at("backward", 3)
    assert read_positions(tmp_path, range(3)) == {1: position.record}
    assert position.record.where() == "stage 2b iteration 12, backward of micro-batch 3"
    position.at("step")
    position.end("OSError: no\n  space " + "x" * 5000)
    [record] = read_positions(tmp_path, range(3)).values()
    assert record.outcome.startswith("OSError: no space xxx") and record.has_failed
    assert "rank 0: nothing" in table({1: record}, 2)
    position.close()
    position.at("data")  # whoever is late writes nowhere
    (tmp_path / "rank_00001.json").write_text('{"pid": 3, "ho')
    assert read_positions(tmp_path, range(3)) == {}


def test_without_a_folder_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Position().begin("1a", 1, "data")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "is_lost"),
    [
        (RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4242"), True),
        (RuntimeError("Timed out waiting 6000ms for recv operation to complete"), True),
        (dist.DistBackendError("whatever"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (TrainingFailure("data/timeout: connection closed"), False),
        (OSError("Connection reset by peer"), False),
    ],
)
def test_lost_contact_is_told_from_other_errors(error: BaseException, is_lost: bool) -> None:
    assert is_lost_contact(error) is is_lost
