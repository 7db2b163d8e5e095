"""Whether the student's own backbone will be the teacher, and whose targets 2a takes, before anything is built."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megabyte_distill.config import parse_arguments
from megabyte_distill.config.engine import EngineConfig, Fp8Format
from megabyte_distill.config.stage import TargetsFrom
from megabyte_distill.memory.planned_stages import planned_stages
from tests.memory.real_rank import BACKBONE, SMALL

KEPT = {"teacher": "a hash", "bf16": False}


def write_run(folder: Path, mark: Any) -> Path:
    """A run with a complete 1b that says so of its backbone."""
    checkpoint = folder / "1b" / "iter_0000001"
    checkpoint.mkdir(parents=True)
    (folder / "teacher.json").write_text("{}")
    (folder / "1b" / "latest_checkpointed_iteration.txt").write_text("1")
    (checkpoint / "metadata.json").write_text("{}")
    state = {"progress": {"iteration": 1}, "train_iters": 1, "keeps_backbone": mark}
    (checkpoint / "loop_state.json").write_text(json.dumps(state))
    return folder


def shared(flags: str) -> dict[str, bool]:
    settings = parse_arguments([*SMALL, *flags.split()])
    return {one.name: one.shares_teacher for one in planned_stages(settings, BACKBONE)}


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--stages 1a,2a", {"1a": True, "2a": True}),
        ("--stages 1a,1b,2a", {"1a": True, "1b": False, "2a": False}),
        ("--stages 1b,2a,2b --freeze-backbone", {"1b": True, "2a": True, "2b": True}),
        ("--stages 1b,2a,2b --1b.freeze-backbone", {"1b": True, "2a": True, "2b": False}),
        ("--stages 2a", {"2a": False}),
        ("--stages 2b --freeze-backbone", {"2b": False}),
        ("--stages 1c,2b --freeze-backbone", {"1c": False, "2b": False}),
    ],
)
def test_a_list_of_stages_says_what_they_start_from(flags: str, expected: dict[str, bool]) -> None:
    assert shared(flags) == expected


@pytest.mark.parametrize(
    ("mark", "flags", "expected"),
    [
        (KEPT, "--{by} {run}", True),
        (KEPT, "--{by} {run} --bf16", False),
        (None, "--{by} {run}", False),
        (True, "--{by} {run}", False),  # of an earlier version
    ],
)
@pytest.mark.parametrize("by", ["load", "save"])
def test_a_run_says_what_its_backbone_is(tmp_path: Path, mark: Any, flags: str, expected: bool, by: str) -> None:
    words = flags.format(by=by, run=write_run(tmp_path / "run", mark))
    assert shared(f"--stages 2a {words}") == {"2a": expected}


def test_what_lies_between_the_stages_counts_unless_it_is_removed(tmp_path: Path) -> None:
    words = f"--stages 1a,2a --byte-targets exact --save {write_run(tmp_path / 'run', None)}"
    assert shared(words) == {"1a": True, "2a": False}
    assert shared(f"{words} --fresh") == {"1a": True, "2a": True}
    *_, behind = planned_stages(parse_arguments([*SMALL, *words.split()]), BACKBONE)
    assert behind.config.exact_targets_from is TargetsFrom.STUDENT


def test_fp8_takes_a_copy() -> None:
    settings = parse_arguments([*SMALL, "--stages", "1a,2a"])
    in_fp8 = replace(settings, engine=EngineConfig(fp8_format=Fp8Format.HYBRID))
    assert not any(one.shares_teacher for one in planned_stages(in_fp8, BACKBONE))
