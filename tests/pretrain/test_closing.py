"""The end of a finished run: summary.json, the table, the plots, the report, and a second start that prints them."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest

from megabyte_distill.evaluation.run_report import HeldOutPage
from megabyte_distill.pretrain import closing
from tests.evaluation.test_run_report import assert_self_contained
from tests.pretrain.job import Job

PROMISED = (
    "teacher_bits_per_byte",
    "student_bits_per_byte",
    "retention",
    "stage1_retention",
    "boundary_f1",
    "alignment_mse_relative",
    "seconds",
)


@pytest.fixture(scope="module")
def closed(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("closed") / "run"
    assert job.run(run, "--summary-bytes", "1500") == 0
    return run


def test_summary_holds_every_promised_figure(closed: Path) -> None:
    summary = json.loads((closed / "summary.json").read_text())
    assert all(math.isfinite(summary[name]) for name in PROMISED)
    assert summary["retention"] == pytest.approx(summary["teacher_bits_per_byte"] / summary["student_bits_per_byte"])
    assert summary["bytes_per_stage"] == dict.fromkeys(("1a", "1b", "1c", "2a", "2b"), 4 * 2 * 256)
    assert summary["paths"]["paths"] == 4
    assert summary["unigram_bits_per_byte"] > 0


def test_the_table_takes_the_last_held_out_figure_that_is_whole(closed: Path, tmp_path: Path) -> None:
    name = "validation joint bits per byte"
    lines = [{"stage": "2b", "iteration": at, name: value} for at, value in ((2, 2.0), (4, 1.5), (3, 1.25))]
    run = Path(shutil.copytree(closed, tmp_path / "run"))
    resumed = "\n".join([*map(json.dumps, lines), '{"stage": "2b", "iteration": 4, "vali'])
    (run / "metrics.jsonl").write_text(resumed)
    rows = closing._stage_rows(run, speaks=True)
    assert [(row.stage, row.value) for row in rows][-2:] == [("2a", None), ("2b", 1.25)]


def test_a_stage_whose_measure_was_lost_has_none_in_the_table(
    closed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Resumed from before its only evaluation, which is not made again; and a log that is not there, which is said."""
    run = Path(shutil.copytree(closed, tmp_path / "run"))
    lines = ({"validation joint bits per byte": 2.0, "iteration": 10}, {"byte ce": 1.0, "iteration": 6})
    (run / "metrics.jsonl").write_text("\n".join(json.dumps({"stage": "2b", **line}) for line in lines))
    assert closing._stage_rows(run, speaks=True)[-1].cells()[-2:] == ("–", "–")
    assert not capsys.readouterr().out
    (run / "metrics.jsonl").unlink()
    for speaks in (True, False):
        assert {row.value for row in closing._stage_rows(run, speaks=speaks)} == {None}
        said = capsys.readouterr().out
        assert ("the closing table has no measures of the stages" in said and "cannot be read" in said) == speaks


def test_plots_are_images(closed: Path) -> None:
    for name in ("losses.png", "boundaries.png", "bytes_per_chunk.png"):
        assert (closed / name).read_bytes().startswith(b"\x89PNG")
    # the others are the report's, and drawn with it
    assert json.loads((closed / "summary.json").read_text())["plots"] == [str(closed / "boundaries.png")]


def test_report_has_the_summary_the_sample_and_a_page(closed: Path) -> None:
    summary = json.loads((closed / "summary.json").read_text())
    reader = assert_self_contained(closed / "report.html")
    assert f"{summary['retention']:.4f}" in reader.text
    assert [text[:4] for text in summary["samples"]] == ["The ", "It w", "She "] and "She said " in reader.text
    assert "after 4 updates of stage 2b" in reader.text and [tag for tag, _ in reader.tags].count("i") > 30


def test_a_report_that_fails_is_said_and_does_not_fail_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no font")

    monkeypatch.setattr(closing, "run_record", broken)
    assert closing.write_run_report(tmp_path, HeldOutPage()) is None
    shown = capsys.readouterr().out
    assert "the report was not written (RuntimeError: no font); python tools/plot_run.py" in shown


def test_second_start_prints_the_summary_and_trains_nothing(
    job: Job, closed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in closed.rglob("*.distcp")}
    assert job.run(closed, "--summary-bytes", "1500") == 0
    shown = capsys.readouterr().out
    assert "bits per byte on" in shown and "retention" in shown and "is complete" in shown
    assert shown.splitlines()[-1] == f"report: {closed / 'report.html'}"
    assert {path: path.stat().st_mtime_ns for path in closed.rglob("*.distcp")} == before


def test_more_updates_of_longer_chunks_replace_the_summary(
    job: Job, closed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = json.loads((closed / "summary.json").read_text())
    assert job.run(closed, "--summary-bytes", "1500", "--2b.train-iters", "6", "--2b.target-bytes-per-chunk", "9") == 0
    after = json.loads((closed / "summary.json").read_text())
    assert after["bytes_per_stage"]["2b"] == 6 * 2 * 256
    assert before["bits"] == "gold" and before["merged_bits_per_byte"] is None
    assert after["bits"] == "merged" and after["student_bits_per_byte"] == after["merged_bits_per_byte"]
    assert after["bytes_per_chunk"] > before["bytes_per_chunk"] + 1
    shown = capsys.readouterr().out
    assert "student, joint, merged bits" in shown and "was taught chunks of several tokens" in shown


def test_fresh_starts_over(job: Job, closed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert job.run(closed, "--summary-bytes", "0", "--fresh", "--stages", "1a") == 0
    assert "starts from teacher" in capsys.readouterr().out
    assert not any((closed / name).exists() for name in ("summary.json", "report.html", "losses.png", "2b"))


def test_no_summary_before_the_decoder_is_trained(job: Job, tmp_path: Path) -> None:
    assert job.run(tmp_path / "run", "--summary-bytes", "1500", "--stages", "1a") == 0
    assert not (tmp_path / "run" / "summary.json").exists()


def test_official_figures_are_marked_as_no_bounds(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--preset", "official", "--train-iters", "2", "--summary-bytes", "800")
    assert job.run(tmp_path / "run", *flags) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert not summary["is_bound"] and summary["sample"] is None and not summary["samples"] and summary["paths"] is None
    assert "are no bounds" in capsys.readouterr().out
