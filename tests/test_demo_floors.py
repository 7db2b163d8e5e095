"""`make demo` fails where the run is worse than it should be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts.check_demo import FLOORS, main


@pytest.mark.parametrize("name", FLOORS)
def test_a_figure_below_its_floor_fails(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "summary.json").write_text(json.dumps(FLOORS))
    assert main([str(tmp_path)]) == 0 and "BELOW" not in capsys.readouterr().out
    (tmp_path / "summary.json").write_text(json.dumps({**FLOORS, name: FLOORS[name] - 1e-3}))
    assert main([str(tmp_path)]) == 1
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.endswith("BELOW")] == [name]


def test_a_run_without_the_figures_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    (tmp_path / "summary.json").write_text(json.dumps({"boundary_f1": 0.95, "retention": None}))
    assert main([str(tmp_path)]) == 2
    assert "has no retention, stage1_retention" in capsys.readouterr().err
