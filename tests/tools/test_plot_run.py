"""tools/plot_run.py: a report of what a run left, however far it came, and one line and exit code 2 for a mistake."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from megabyte_distill.pretrain import held_out_page
from tests.evaluation.test_run_report import assert_self_contained
from tools.plot_run import main

PNG_FILES = {"losses.png", "bits_per_byte.png", "boundary_f1.png", "throughput.png"}


def copy_of(run: Path, target: Path, *stages: str) -> Path:
    """A run that came as far as these stages, with a last line that is being written."""
    target.mkdir()
    for name in ("teacher.json", "model_config.json"):
        shutil.copy(run / name, target)
    shutil.copytree(run / "tokenizer", target / "tokenizer")
    for stage in stages:
        shutil.copytree(run / stage, target / stage)
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["stage"] in (*stages, "1a")]
    (target / "metrics.jsonl").write_text("".join(kept) + kept[-1][:30])
    return target


@pytest.mark.usefixtures("every_line")
def test_a_finished_run_has_a_report_with_its_pictures_and_a_page(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(finished), "--output", str(tmp_path / "out"), "--text-bytes", "300"]) == 0
    output = capsys.readouterr()
    assert output.out == f"written: {tmp_path}/out/report.html and {len(list((tmp_path / 'out').glob('*.png')))} " \
        "pictures beside it\n"  # fmt: skip
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"report.html", *PNG_FILES}
    shown = [line for line in output.err.splitlines() if line.startswith(f"page of {finished.name}: ")]
    assert shown[-1].startswith(f"page of {finished.name}: 100 %, 300B of 300B"), shown
    reader = assert_self_contained(tmp_path / "out" / "report.html")
    assert "after 4 updates of stage 2b, the beginning of" in reader.text
    marks = [attributes["class"] for tag, attributes in reader.tags if tag == "i"]
    assert len(marks) > 3 + 30, "the legend's three and the page's"
    for expected in ("megatron-core", "seq_length", "1b", "4 of 4"):
        assert expected in reader.text


def test_a_run_that_is_being_trained_is_shown_as_far_as_it_is(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy_of(finished, tmp_path / "run", "1a")
    assert main([str(run)]) == 0
    assert "no page: no checkpoint of 1c, 2a, 2b" in capsys.readouterr().err
    reader = assert_self_contained(run / "report.html")
    assert "4 of 4" in reader.text and "no summary.json" in reader.text
    (run / "1a" / "latest_checkpointed_iteration.txt").write_text("9")
    (run / "metrics.jsonl").unlink()
    (run / "summary.json").write_text("{")
    assert main([str(run)]) == 0
    noted = capsys.readouterr().err
    assert "stage 1a: " in noted and "metrics.jsonl: cannot be read" in noted and "summary.json cannot be read" in noted


def test_several_runs_stand_side_by_side(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = copy_of(finished, tmp_path / "short", "1a", "1c")
    assert main([str(short), str(finished), "--no-model"]) == 0
    assert capsys.readouterr().err == "", "what was left out on purpose is no problem"
    reader = assert_self_contained(tmp_path / "comparison" / "report.html")
    assert "short 1c" in reader.text and f"{finished.name} 2b" in reader.text


def test_a_page_of_data_that_moved_says_so_or_takes_other_text(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = copy_of(finished, tmp_path / "run", "1a", "1c")
    settings = held_out_page.read_run_config(run / "1c" / "iter_0000004")
    [stem] = settings.data.valid_data_path
    moved = replace(settings, data=replace(settings.data, valid_data_path=("/gone/held_text_document",)))
    monkeypatch.setattr(held_out_page, "read_run_config", lambda path: moved)
    assert main([str(run)]) == 0
    assert "/gone/held_text_document is not there; --data-path" in capsys.readouterr().err
    assert main([str(run), "--data-path", stem, "--text-bytes", "50"]) == 0
    assert capsys.readouterr().err == ""
    assert f"the beginning of {stem}" in assert_self_contained(run / "report.html").text


def test_relative_data_is_looked_for_where_training_was_started(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = copy_of(finished, tmp_path / "run", "1a", "1c")
    settings = held_out_page.read_run_config(run / "1c" / "iter_0000004")
    stem = Path(settings.data.valid_data_path[0])
    for path in stem.parent.glob(f"{stem.name.removesuffix('_document')}_*"):
        shutil.copy(path, tmp_path)
    moved = replace(
        settings,
        data=replace(settings.data, valid_data_path=("0.5", f"./{stem.name}")),
        checkpoint=replace(settings.checkpoint, save="./run"),
    )
    monkeypatch.setattr(held_out_page, "read_run_config", lambda path: moved)
    assert main([str(run), "--text-bytes", "50"]) == 0
    assert f"the beginning of {tmp_path / stem.name}" in assert_self_contained(run / "report.html").text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{tmp}"], "is not a run: expected a folder written by training, with teacher.json in it"),
        (["{tmp}/nowhere"], "is not a folder: expected a folder written by training"),
        (["{run}/2a"], "is a stage of a run; give the run's own folder"),
        (["{run}", "{run}/"], "is given twice"),
        (["{run}", "--text-bytes", "-1"], "--text-bytes: got -1, expected a whole number of at least 0"),
        (["{run}", "--no-model", "--output", "{run}/metrics.jsonl"], "metrics.jsonl"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_written(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    before = sorted(finished.rglob("*"))
    assert main([word.format(tmp=tmp_path, run=finished) for word in words]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
    assert sorted(finished.rglob("*")) == before and not list(tmp_path.iterdir())
