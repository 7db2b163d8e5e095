"""What the log line and the metric files hold."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from megabyte_distill.training.logging import MetricWriter, duration, log_line
from tests.pretrain.job import Job


def line(**changes: Any) -> str:
    values: dict[str, Any] = {
        "stage": "1a", "iteration": 20, "train_iters": 100, "consumed_rows": 80, "milliseconds": 12.34,
        "learning_rate": 1e-3, "global_batch_size": 4, "averages": {"loss": 1.5}, "grad_norm": 0.5, "skipped": 0,
        "nan_iterations": 0, "bytes_per_second": 1000.0, "eta_seconds": 61.0,
    }  # fmt: skip
    return log_line(**{**values, **changes})


def test_megatrons_cells_are_there() -> None:
    text = line()
    assert re.match(r" \[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\] stage 1a iteration +20/ +100 \| ", text)
    for cell in (
        "consumed samples: 80",
        "elapsed time per iteration (ms): 12.3",
        "learning rate: 1.000000E-03",
        "global batch size: 4",
        "loss: 1.500000E+00",
        "grad norm: 0.500",
        "number of skipped iterations: 0",
        "number of nan iterations: 0",
        "ETA: 0:01:01",
    ):
        assert f"| {cell} |" in text, cell


def test_throughput_is_shown_where_it_was_counted() -> None:
    assert "TFLOP" not in line()
    assert "| throughput per GPU (TFLOP/s/GPU): 123.5 |" in line(teraflops=123.45)


@pytest.mark.parametrize(("value", "shown"), [(math.nan, "NAN"), (math.inf, "INF"), (-2.5, "-2.500000E+00")])
def test_no_value_is_dropped(value: float, shown: str) -> None:
    assert f"| odd: {shown} |" in line(averages={"odd": value})
    assert f"grad norm: {value:.3f}" in line(grad_norm=value)


def test_durations_are_never_negative() -> None:
    assert duration(-3) == "0:00:00"
    assert duration(3661.4) == "1:01:01"


def test_the_writer_appends_and_drops_what_a_kill_left_of_a_line(tmp_path: Path) -> None:
    writer = MetricWriter(tmp_path)
    writer.write("1a", 1, {"loss": 1.0, "odd": math.nan})
    writer.close()
    path = tmp_path / "metrics.jsonl"
    whole = path.read_text()
    path.write_text(whole + '{"stage": "1a", "iter')
    writer = MetricWriter(tmp_path)
    writer.write("1a", 2, {"loss": 2.0})
    writer.close()
    records = [json.loads(text) for text in path.read_text().splitlines()]
    assert [(record["iteration"], record["loss"]) for record in records] == [(1, 1.0), (2, 2.0)]
    assert records[0]["odd"] is None, "JSON has no NaN"
    assert path.read_text().startswith(whole)


def test_a_writer_without_a_folder_swallows_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    writer = MetricWriter(None)
    writer.write("1a", 1, {"loss": 1.0})
    writer.close()
    assert not list(tmp_path.iterdir())


def test_a_run_leaves_tensorboard_files_and_one_record_an_update(finished: Path) -> None:
    assert list((finished / "tensorboard").glob("events.out.tfevents.*"))
    records = [json.loads(text) for text in (finished / "metrics.jsonl").read_text().splitlines()]
    seen = [(record["stage"], record["iteration"]) for record in records if "grad norm" in record]
    assert seen == [(stage, iteration) for stage in ("1a", "1b", "1c", "2a", "2b") for iteration in (1, 2, 3, 4)]


def test_the_log_interval_averages_over_its_updates(job: Job, finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    board = tmp_path / "board"
    flags = ("--stages", "1c", "--log-interval", "4", "--eval-iters", "0", "--tensorboard-dir", str(board))
    single = tmp_path / "single"
    assert job.run(run, "--load", str(finished), *flags) == 0
    assert job.run(single, "--load", str(finished), *flags[:2], "--eval-iters", "0") == 0

    def losses(folder: Path) -> list[float]:
        records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        return [record["router bce"] for record in records]

    assert len(losses(run)) == 1 and len(losses(single)) == 4
    assert losses(run)[0] == pytest.approx(sum(losses(single)) / 4, rel=0.05)  # weighted by their counts
    assert list(board.glob("events.out.tfevents.*"))
