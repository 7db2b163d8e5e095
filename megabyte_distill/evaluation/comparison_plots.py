"""Pictures of a comparison: data sets side by side, and what robustness costs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megabyte_distill.evaluation.bits_per_byte import Comparison, Evaluation
from megabyte_distill.evaluation.png import save_figure
from megabyte_distill.evaluation.robustness import Section

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


def plot_robustness(sections: Sequence[Section], target: Path) -> None:
    """A panel for each section: both models' figures line by line, with confidence intervals."""
    sections = [section for section in sections if section.lines]
    heights = [1.1 + 0.2 * len(section.lines) for section in sections]
    figure = Figure(figsize=(7.0, sum(heights)), layout="constrained")
    panels = figure.subplots(len(sections), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for axes, section in zip(panels, sections, strict=True):
        places = np.arange(len(section.lines))
        for shift, colour, who in ((-0.12, TEACHER, "teacher"), (0.12, STUDENT, "student")):
            values = [getattr(line, who) for line in section.lines]
            axes.plot(
                [np.nan if value is None else value for value in values], places + shift, "o", ms=4, color=colour,
                label=who,
            )  # fmt: skip
            for place, line in zip(places, section.lines, strict=True):
                interval = getattr(line, f"{who}_interval")
                if interval is not None:
                    axes.plot(interval, [place + shift] * 2, color=colour, lw=1)
        axes.set_yticks(places, [line.label for line in section.lines], fontsize=7)
        axes.invert_yaxis()
        axes.set_title(f"{section.name}: {section.measure}", fontsize=8, loc="left")
        axes.grid(axis="x", lw=0.4)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False, fontsize=8)
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
