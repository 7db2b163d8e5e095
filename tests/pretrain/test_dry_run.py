"""--dry-run says what a job would do and need, and leaves no trace."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megabyte_distill.config import parse_arguments
from megabyte_distill.config.run_config import settings_from_dict
from megabyte_distill.pretrain.main import main
from tests.pretrain.job import ROOT, Job


def printed_settings(text: str) -> dict[str, Any]:
    """The JSON object in front of the table."""
    settings, _ = json.JSONDecoder().raw_decode(text[text.index("{") :])
    assert isinstance(settings, dict)
    return settings


def test_a_published_model_needs_neither_teacher_nor_data_nor_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "8")
    flags = ["--preset", "olmo2-1b", "--stages", "1b", "--load", "nowhere", "--save", "run", "--data-path", "none"]
    assert main([*flags, "--pipeline-model-parallel-size", "2", "--dry-run"]) == 0
    text = capsys.readouterr().out
    wanted = parse_arguments([*flags, "--pipeline-model-parallel-size", "2", "--dry-run"], world_size=8)
    assert settings_from_dict(printed_settings(text)["settings"]) == wanted
    assert "8 ranks = tensor 1 × pipeline 2 × data 4" in text
    assert text.count("\n   1b ") == 2, "a line for each pipeline rank"
    assert "5,000 updates of 2,097,152 bytes = 10.49 billion bytes" in text
    assert not list(tmp_path.iterdir())


def test_a_teacher_that_is_there_says_its_shape(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert job.run(tmp_path / "run", "--stages", "2b", "--dry-run") == 0
    assert "0.0001 B" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_the_embedded_teacher_is_taken_where_nobody_names_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--stages", "1a", "--dry-run"]
    assert main(flags, example_folder=ROOT / "examples" / "tiny", example_run=tmp_path / "run") == 0
    text = capsys.readouterr().out
    assert "0.0052 B" in text and "1,500 updates of 2,048 bytes = 3.07 million bytes" in text
    assert not (tmp_path / "run").exists()


def test_a_shape_that_nobody_knows_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--mock-data", "--load", str(tmp_path / "none"), "--save", str(tmp_path / "run"), "--dry-run"]
    assert main(flags) == 2
    assert "--preset tiny is no published model whose shape is known; give --load" in capsys.readouterr().err


def test_sizes_that_do_not_fit_are_named_as_in_training(capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--preset olmo2-1b --mock-data --stages 2b --recompute-granularity full --recompute-num-layers 3 --dry-run"
    assert main(flags.split()) == 2
    assert "--recompute-num-layers 3 does not divide the 16 layers" in capsys.readouterr().err
