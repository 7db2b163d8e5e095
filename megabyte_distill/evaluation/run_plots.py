"""Pictures of one run or several: what they recorded, a column a stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from megabyte_distill.config.stage import STAGE_ORDER
from megabyte_distill.evaluation.metrics_log import VALIDATION, Curves, Kind, Series, kind_of
from megabyte_distill.evaluation.png import FAINT, INK

PICTURES: dict[str, tuple[Kind, ...]] = {
    "losses": (Kind.LOSS, Kind.LEARNING_RATE, Kind.GRADIENT),
    "bits_per_byte": (Kind.BITS,),
    "boundary_f1": (Kind.F1,),
    "bytes_per_chunk": (Kind.CHUNK_BYTES,),
    "throughput": (Kind.SPEED,),
    "target_shares": (Kind.SHARE,),
}
"""Name of a picture → its rows."""
_COLOURS = ("#1f6fb4", "#d1752a", "#3a8f4a", "#8a4fa3", "#b8342f", "#6d5a3f", "#0e8c8c", "#7a7f87")
_DASHES: tuple[str | tuple[int, tuple[int, ...]], ...] = ("-", (0, (5, 2)), (0, (1, 1)), (0, (5, 1, 1, 1)))
_LOGARITHMIC = (Kind.LOSS, Kind.GRADIENT)
"""Kinds whose axis is logarithmic where values span a decade."""


def draw(runs: Mapping[str, Curves], kinds: Sequence[Kind]) -> Figure | None:
    """A row a kind, a column a stage, as far as any run (name → curves) has them; None where none has any.

    A single run has a colour a figure, several have a colour each and a dash a figure. Held-out values are thick with
    dots.
    """
    kinds = [kind for kind in kinds if _stages(runs, [kind])]
    stages = _stages(runs, kinds)
    if not stages:
        return None
    size = (max(4.2, 0.5 + 3.1 * len(stages)), 0.7 + 2.3 * len(kinds))
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    grid = figure.subplots(len(kinds), len(stages), squeeze=False)
    for row, kind in enumerate(kinds):
        for column, stage in enumerate(stages):
            axes = grid[row, column]
            if row == 0:
                axes.set_title(f"stage {stage}", fontsize=11, fontweight="bold", color=INK)
            shown = {name: series for name, curves in runs.items() if (series := _figures(curves, stage, kind))}
            if not shown:
                axes.spines[:].set_visible(False)
                axes.set(xticks=[], yticks=[])
                continue
            _panel(axes, list(runs), shown, kind)
            axes.set_xlim(0, 1.03 * max(1, *(_last_update(curves, stage) for curves in runs.values())))
        grid[row, 0].set_ylabel(kind.value, fontsize=9, color=INK)
    for axes in grid[-1]:
        axes.set_xlabel("update", fontsize=9, color=INK)
    _legend(figure, list(runs), list(grid.flat))
    return figure


def _stages(runs: Mapping[str, Curves], kinds: Sequence[Kind]) -> list[str]:
    found = {
        stage for curves in runs.values() for stage in curves if any(_figures(curves, stage, kind) for kind in kinds)
    }
    return sorted(found, key=lambda stage: (STAGE_ORDER.index(stage) if stage in STAGE_ORDER else 99, stage))


def _figures(curves: Curves, stage: str, kind: Kind) -> dict[str, Series]:
    return {name: series for name, series in curves.get(stage, {}).items() if kind_of(name) is kind and series.points}


def _last_update(curves: Curves, stage: str) -> int:
    return max((max(series.points) for series in curves.get(stage, {}).values() if series.points), default=0)


def _panel(axes: Axes, names: Sequence[str], shown: Mapping[str, Mapping[str, Series]], kind: Kind) -> None:
    figures = list(dict.fromkeys(name.removeprefix(VALIDATION) for series in shown.values() for name in series))
    is_single = len(names) == 1
    for run, series in shown.items():
        for name, curve in series.items():
            number = figures.index(name.removeprefix(VALIDATION))
            colour = _COLOURS[(number if is_single else names.index(run)) % len(_COLOURS)]
            is_held_out = name.startswith(VALIDATION)
            axes.plot(
                *curve.xy(), color=colour, ls=_DASHES[number % len(_DASHES)], lw=1.8 if is_held_out else 1.1,
                marker="o" if is_held_out else "." if len(curve.points) == 1 else None, ms=4,
                alpha=1.0 if is_held_out else 0.65,
            )  # fmt: skip
    handles = [
        Line2D([], [], color=_COLOURS[number % len(_COLOURS)] if is_single else INK, ls=_DASHES[number % len(_DASHES)],
               label=name)
        for number, name in enumerate(figures)
    ]  # fmt: skip
    if len(figures) > 1 or (kind in (Kind.LOSS, Kind.BITS, Kind.CHUNK_BYTES) and figures != [kind.value]):
        axes.legend(handles=handles, framealpha=0.8, edgecolor="none", fontsize=7.5, handlelength=1.8, labelcolor=INK)
    if kind in _LOGARITHMIC and _spans_a_decade(axes):
        axes.set_yscale("log")
    if kind is Kind.SPEED:
        axes.set_ylim(bottom=0)
    axes.grid(axis="y", color=FAINT, lw=0.5, alpha=0.6)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
    axes.tick_params(which="both", labelsize=8, colors=INK, length=3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)


def _spans_a_decade(axes: Axes) -> bool:
    values = np.concatenate([np.asarray(line.get_ydata(), dtype=np.float64) for line in axes.get_lines()])
    values = values[np.isfinite(values)]
    return bool(values.size) and bool(0 < values.min() < values.max() / 10)


def _shown(name: str) -> str:
    """A long name by its end; dollar signs are no formulas, and a first "_" would hide the name."""
    short = name if len(name) <= 40 else f"…{name[-39:]}"
    return (f" {short}" if short.startswith("_") else short).replace("$", r"\$")


def _legend(figure: Figure, runs: Sequence[str], panels: Sequence[Axes]) -> None:
    """Runs by colour, and how training and held-out values are drawn where both are there."""
    widths = {line.get_linewidth() for axes in panels for line in axes.get_lines()}
    handles = [
        Line2D([], [], color=_COLOURS[number % len(_COLOURS)], lw=3, label=_shown(name))
        for number, name in enumerate(runs)
        if len(runs) > 1
    ]
    if len(widths) > 1:
        handles += [
            Line2D([], [], color=INK, lw=1.1, alpha=0.65, label="training"),
            Line2D([], [], color=INK, lw=1.8, marker="o", ms=4, label="validation"),
        ]
    if handles:
        figure.legend(handles=handles, loc="outside upper right", ncols=4, frameon=False, fontsize=9)
