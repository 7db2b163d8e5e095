"""`make demo` fails where the run is worse than it should be."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from scripts.check_demo import FLOORS, main


@pytest.mark.parametrize("name", FLOORS)
def test_a_figure_below_its_floor_fails(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "summary.json").write_text(json.dumps(FLOORS))
    assert main([str(tmp_path)]) == 0 and "BELOW" not in capsys.readouterr().out
    (tmp_path / "summary.json").write_text(json.dumps({**FLOORS, name: FLOORS[name] - 1e-3}))
    assert main([str(tmp_path)]) == 1
    output = capsys.readouterr()
    assert [line.split()[0] for line in output.out.splitlines() if line.endswith("BELOW")] == [name]
    assert output.err == f"error: {name} of {tmp_path} below the floor\n"


def test_figures_of_before_the_last_checkpoint_are_not_judged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "summary.json").write_text(json.dumps(FLOORS))
    saved = tmp_path / "2b" / "latest_checkpointed_iteration.txt"
    saved.parent.mkdir()
    saved.write_text("3")
    of_summary = (tmp_path / "summary.json").stat().st_mtime
    for later, code in ((-1, 0), (1, 2)):
        os.utime(saved, (of_summary + later, of_summary + later))
        assert main([str(tmp_path)]) == code
    assert f"summary.json is older than {saved}" in capsys.readouterr().err


def test_a_run_without_the_figures_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    (tmp_path / "summary.json").write_text(json.dumps({"boundary_f1": 0.95, "retention": None}))
    assert main([str(tmp_path)]) == 2
    assert "has no retention, stage1_retention" in capsys.readouterr().err
