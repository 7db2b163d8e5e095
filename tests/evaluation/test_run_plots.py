"""Pictures of runs: a column a stage, a row a kind, whatever the runs recorded."""

from __future__ import annotations

import math
from pathlib import Path

from megabyte_distill.evaluation.metrics_log import Curves, Kind, Series, read_metrics
from megabyte_distill.evaluation.png import png_of
from megabyte_distill.evaluation.run_plots import PICTURES, draw
from tests.evaluation.test_metrics_log import write

PNG = b"\x89PNG"


def curves(**stages: dict[str, dict[int, float]]) -> Curves:
    return {
        name.strip("_"): {figure: Series(points) for figure, points in series.items()}
        for name, series in stages.items()
    }


def test_losses_are_drawn_with_gaps_and_negative_values(tmp_path: Path) -> None:
    metrics = write(
        tmp_path / "metrics.jsonl",
        {"stage": "1a", "iteration": 1, "alignment mse": 1.0, "alignment mse relative": math.nan},
        {"stage": "2b", "iteration": 1, "byte ce": -1.0, "joint bits per byte": 100.0, "boundary f1": 0.5},
        {"stage": "2b", "iteration": 2, "byte ce": 1.0, "joint bits per byte": 2.0, "validation boundary f1": 0.6},
    )
    figure = draw({"": read_metrics(metrics)}, PICTURES["losses"])
    assert figure is not None and png_of(figure)[:4] == PNG


def test_runs_of_other_stages_share_columns_in_the_curriculums_order() -> None:
    first = curves(_2a={"byte ce": {1: 2.0}, "learning rate": {1: 0.1}}, _1a={"mse": {1: 1.0, 2: 0.5}})
    second = curves(_1c={"router bce": {5: 0.3}, "boundary f1": {5: 0.9}}, _2a={"byte ce": {1: 3.0, 2: 1.0}})
    figure = draw({"_one $x": first, "two": second}, (Kind.LOSS, Kind.LEARNING_RATE, Kind.F1))
    assert figure is not None and png_of(figure)[:4] == PNG
    titles = [axes.get_title() for axes in figure.axes]
    assert [title for title in titles if title] == ["stage 1a", "stage 1c", "stage 2a"]
    colours = {line.get_color() for line in figure.axes[2].get_lines()}
    assert len(colours) == 2, "a colour a run"
    assert figure.axes[0].get_xlim()[1] >= 2


def test_held_out_values_are_told_from_training() -> None:
    figure = draw({"": curves(_2a={"byte ce": {1: 2.0, 2: 1.0}, "validation byte ce": {2: 1.5}})}, (Kind.LOSS,))
    assert figure is not None
    training, held_out = figure.axes[0].get_lines()
    assert list(held_out.get_ydata()) == [1.5] and held_out.get_marker() == "o"
    assert held_out.get_linewidth() > training.get_linewidth()


def test_no_picture_of_what_no_run_recorded() -> None:
    assert draw({"": curves(_1a={"mse": {1: 1.0}})}, (Kind.F1,)) is None
    assert draw({"": {}}, (Kind.LOSS,)) is None
