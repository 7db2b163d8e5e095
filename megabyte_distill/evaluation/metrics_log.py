"""RUN/metrics.jsonl as curves: a figure's values by update, stage by stage."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

VALIDATION = "validation "
"""How the name of a held-out figure begins."""
_PLACE = ("stage", "iteration", "time")
"""Entries of a record that are no figures."""


class Kind(str, Enum):
    """What a figure is, as a picture's axis is called."""

    LOSS = "loss"
    LEARNING_RATE = "learning rate"
    GRADIENT = "gradient norm"
    BITS = "bits per byte"
    F1 = "boundary F1"
    CHUNK_BYTES = "bytes per chunk"
    SPEED = "bytes/s"
    SHARE = "share"


_ENDINGS = {
    "bits per byte": Kind.BITS,
    "f1": Kind.F1,
    "bytes per chunk": Kind.CHUNK_BYTES,
    "bytes/s": Kind.SPEED,
    "learning rate": Kind.LEARNING_RATE,
    "grad norm": Kind.GRADIENT,
    "exact targets replaced": Kind.SHARE,
    "teacher mass excluded": Kind.SHARE,
}


def kind_of(name: str) -> Kind:
    """By how the name ends; what no ending tells is a loss."""
    return next((kind for ending, kind in _ENDINGS.items() if name.endswith(ending)), Kind.LOSS)


@dataclass
class Series:
    """One curve, of one point at least. Where a resumed run says an update again, that is the value."""

    points: dict[int, float] = field(default_factory=dict)

    def xy(self) -> tuple[list[int], list[float]]:
        """Updates, rising, and their values; NaN where the run recorded no finite one."""
        xs = sorted(self.points)
        return xs, [self.points[x] for x in xs]

    @property
    def last(self) -> float:
        """The value of the last update."""
        return self.points[max(self.points)]


Curves = dict[str, dict[str, Series]]
"""stage → name of a figure as in the file → its curve."""


def read_metrics(metrics: Path) -> Curves:
    """The curves in RUN/metrics.jsonl, stages in the order in which they began.

    The file may be written to meanwhile: a last line that is not whole is left out. Where a stage goes back, because it
    was resumed from a checkpoint, what was recorded from there on is dropped. ValueError where the file is missing or
    holds no figure.
    """
    try:
        text = metrics.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise ValueError(f"{metrics}: cannot be read ({error.strerror}); expected the metrics of a run") from error
    curves: Curves = {}
    reached: dict[str, int] = {}
    for record in _records(text):
        name, iteration = str(record["stage"]), record["iteration"]
        stage = curves.setdefault(name, {})
        if iteration < reached.get(name, iteration):
            _forget(stage, iteration)
        reached[name] = iteration
        for figure, value in record.items():
            if figure not in _PLACE and (value is None or isinstance(value, int | float)):
                stage.setdefault(figure, Series()).points[iteration] = math.nan if value is None else float(value)
    curves = {stage: series for stage, series in curves.items() if series}
    if not curves:
        raise ValueError(f"{metrics}: holds no figures; a run writes them at each --log-interval")
    return curves


def _records(text: str) -> Iterator[dict[str, Any]]:
    for line in text.split("\n"):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict) and "stage" in record and isinstance(record.get("iteration"), int):
            yield record


def _forget(stage: dict[str, Series], iteration: int) -> None:
    for figure, series in [*stage.items()]:
        series.points = {x: value for x, value in series.points.items() if x < iteration}
        if not series.points:
            del stage[figure]
