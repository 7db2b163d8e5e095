"""Pictures of a comparison: data sets side by side, and what robustness costs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megabyte_distill.evaluation.bits_per_byte import Comparison, Evaluation
from megabyte_distill.evaluation.plots import save_figure

TEACHER, STUDENT = "#6b7280", "#1f6fb4"
_WIDTH = 0.38
"""Of a bar, where a set has one for each model and takes one unit."""


def plot_sets(comparison: Comparison, target: Path) -> None:
    """Bits per byte of teacher and student and the retention of each data set, with confidence intervals."""
    sets = comparison.sets
    figure = Figure(figsize=(max(6.0, 1.5 + 1.2 * len(sets)), 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    places = np.arange(len(sets))
    parts = list(sets.values())
    for shift, colour, label, name in (
        (-_WIDTH / 2, TEACHER, "teacher", "teacher_bits_per_byte"),
        (_WIDTH / 2, STUDENT, f"student, {comparison.total.bits.value} bits", "student_bits_per_byte"),
    ):
        _bars(left, places + shift, parts, name, colour, label)
    left.set_ylabel("bits per byte")
    left.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    _bars(right, places, parts, "retention", STUDENT, None)
    right.axhline(1.0, color=TEACHER, lw=0.8, ls=(0, (4, 4)))
    right.set_ylabel("retention")
    for axes in (left, right):
        axes.set_xticks(places, [_shown(name) for name in sets], rotation=30, ha="right", fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, target)


def _bars(
    axes: Axes, places: np.ndarray, parts: Sequence[Evaluation], name: str, colour: str, label: str | None
) -> None:
    values = [getattr(part, name) for part in parts]
    axes.bar(places, values, _WIDTH, color=colour, label=label)
    for place, value, part in zip(places, values, parts, strict=True):
        if name in part.intervals:
            low, high = part.intervals[name]
            axes.plot([place, place], [min(low, value), max(high, value)], color="#22262b", lw=1.2)


def _shown(name: str) -> str:
    """A long stem by its end; dollar signs are no formulas."""
    return (name if len(name) <= 24 else f"…{name[-23:]}").replace("$", r"\$")
