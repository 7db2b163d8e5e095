"""metrics.jsonl is read as it is found: whole, being written to, or of a run that was resumed."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from megabyte_distill.evaluation.metrics_log import Kind, kind_of, read_metrics


def write(path: Path, *records: dict[str, object], tail: str = "") -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + tail)
    return path


def test_curves_are_read_by_stage_and_a_half_last_line_is_left_out(tmp_path: Path) -> None:
    metrics = write(
        tmp_path / "metrics.jsonl",
        {"stage": "1a", "iteration": 1, "time": 0.0, "mse": 3.0, "learning rate": 1.0},
        {"stage": "1a", "iteration": 2, "time": 0.0, "mse": None},
        {"stage": "1b", "iteration": 1, "time": 0.0, "validation kl": 0.5},
        tail='{"stage": "1b", "itera',
    )
    curves = read_metrics(metrics)
    assert {stage: list(series) for stage, series in curves.items()} == {
        "1a": ["mse", "learning rate"],
        "1b": ["validation kl"],
    }
    xs, ys = curves["1a"]["mse"].xy()
    assert xs == [1, 2] and ys[0] == 3.0 and math.isnan(ys[1])


def test_what_a_resumed_run_says_again_replaces_what_was_said_before(tmp_path: Path) -> None:
    """Resumed from update 100 with another --log-interval: nothing of the lost updates stays."""
    lost = [{"stage": "1a", "iteration": i, "mse": 9.0} for i in (50, 100, 125, 150)]
    lost.append({"stage": "1a", "iteration": 150, "validation mse": 9.0})
    again = [{"stage": "1a", "iteration": i, "mse": 1.0} for i in (110, 140)]
    curves = read_metrics(write(tmp_path / "metrics.jsonl", *lost, *again))
    assert curves["1a"]["mse"].xy() == ([50, 100, 110, 140], [9.0, 9.0, 1.0, 1.0])
    assert list(curves["1a"]) == ["mse"], "no curve is left without a point"


@pytest.mark.parametrize("content", [None, "", "nothing\n", '{"stage": "1a", "iteration": 1, "time": 0}\n', "[1]\n"])
def test_metrics_without_figures_are_refused(tmp_path: Path, content: str | None) -> None:
    metrics = tmp_path / "metrics.jsonl"
    if content is not None:
        metrics.write_text(content)
    with pytest.raises(ValueError, match=r"metrics\.jsonl"):
        read_metrics(metrics)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("validation joint bits per byte", Kind.BITS),
        ("boundary f1", Kind.F1),
        ("router bytes per chunk", Kind.CHUNK_BYTES),
        ("bytes/s", Kind.SPEED),
        ("validation alignment mse", Kind.LOSS),
    ],
)
def test_a_name_says_what_a_figure_is(name: str, kind: Kind) -> None:
    assert kind_of(name) is kind
