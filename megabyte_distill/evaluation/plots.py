"""Pictures of a run: its losses by stage, and a sentence with its learned boundaries."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from megabyte_distill.evaluation.marked_text import MarkedText

_NOT_A_FIGURE = {"stage", "iteration", "time", "learning rate", "grad norm", "bytes/s"}
_VALIDATION = "validation "
_MEASURES = ("bits per byte", "f1", "relative")
"""How a figure's name ends when it is not a loss in nats."""
_COLOURS = ("#1f6fb4", "#d1752a", "#3a8f4a", "#8a4fa3")
_INK, _FAINT = "#22262b", "#b9bec6"
_HIT, _MISSED, _EXTRA = "#2f7d5b", "#e08a1e", "#c0392b"
BYTES_OF_A_LINE = 64
"""Bytes of a sentence in one strip."""


@dataclass
class _Series:
    """One curve: values by iteration; a resumed run's repetition of an iteration replaces the first."""

    points: dict[int, float] = field(default_factory=dict)

    def xy(self) -> tuple[list[int], list[float]]:
        xs = sorted(self.points)
        return xs, [self.points[x] for x in xs]


Curves = dict[str, dict[str, _Series]]
"""stage → name of a figure as in the metrics file → its curve."""


def read_metrics(metrics: Path) -> Curves:
    """The curves in RUN/metrics.jsonl, stages in the order in which they began.

    ValueError where the file is missing or holds no figure. A last line that was cut off by a kill is left out.
    """
    try:
        lines = metrics.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ValueError(f"{metrics}: cannot be read ({error.strerror}); expected the metrics of a run") from error
    curves: Curves = {}
    for record in _records(lines):
        stage = curves.setdefault(str(record["stage"]), {})
        for name, value in record.items():
            if name not in _NOT_A_FIGURE:
                stage.setdefault(name, _Series()).points[int(record["iteration"])] = (
                    math.nan if value is None else float(value)
                )
    if not any(curves.values()):
        raise ValueError(f"{metrics}: holds no figures; a run writes them at each --log-interval")
    return {stage: names for stage, names in curves.items() if names}


def _records(lines: Sequence[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict) and {"stage", "iteration"} <= record.keys():
            yield record


def plot_losses(metrics: Path, target: Path) -> None:
    """Writes a PNG with a column a stage: its losses above, what they are good for below. Errors as read_metrics."""
    curves = read_metrics(metrics)
    columns = len(curves)
    figure = Figure(figsize=(max(4.0, 3.1 * columns), 5.6), dpi=130, layout="constrained")
    grid = figure.subplots(2, columns, squeeze=False)
    for column, (stage, series) in enumerate(curves.items()):
        losses = {name: curve for name, curve in series.items() if not _is_measure(name)}
        measures = {name: curve for name, curve in series.items() if _is_measure(name)}
        grid[0, column].set_title(f"stage {stage}", fontsize=11, fontweight="bold", color=_INK)
        _draw_curves(grid[0, column], losses)
        _draw_curves(grid[1, column], measures)
        grid[1, column].set_xlabel("update", fontsize=9, color=_INK)
    styles = [
        Line2D([], [], color=_INK, lw=1.0, alpha=0.55, label="training"),
        Line2D([], [], color=_INK, lw=1.8, marker="o", ms=4, label="validation"),
    ]
    figure.legend(handles=styles, loc="outside upper right", ncols=2, frameon=False, fontsize=9)
    save_figure(figure, target)


def _is_measure(name: str) -> bool:
    return name.endswith(_MEASURES)


def _draw_curves(axes: Axes, curves: dict[str, _Series]) -> None:
    """Training thin, validation bold, one colour a figure; a share such as F1 beside bits has the right-hand axis."""
    if not curves:
        axes.set_axis_off()
        return
    names = list(dict.fromkeys(name.removeprefix(_VALIDATION) for name in curves))
    shares = [name for name in names if name.endswith("f1")]
    right = axes.twinx() if shares and len(shares) < len(names) else axes
    for colour, name in zip(_COLOURS * len(names), names, strict=False):
        target = right if name in shares else axes
        if name in curves:
            target.plot(*curves[name].xy(), color=colour, lw=1.0, alpha=0.55)
        if _VALIDATION + name in curves:
            target.plot(*curves[_VALIDATION + name].xy(), color=colour, lw=1.8, marker="o", ms=4)
        axes.plot([], [], color=colour, lw=1.8, label=name + (" (right)" if target is not axes else ""))
    for target in dict.fromkeys((axes, right)):
        if _spans_a_decade(target):
            target.set_yscale("log")
        _tidy(target)
    axes.grid(axis="y", color=_FAINT, lw=0.5, alpha=0.6)
    right.spines["right"].set_visible(right is not axes)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    right.legend(*axes.get_legend_handles_labels(), frameon=True, framealpha=0.8, edgecolor="none", fontsize=8,
                 handlelength=1.2, labelcolor=_INK)  # fmt: skip


def _spans_a_decade(axes: Axes) -> bool:
    values = np.concatenate([np.asarray(line.get_ydata(), dtype=np.float64) for line in axes.get_lines()])
    values = values[np.isfinite(values)]
    return bool(values.size) and bool(0 < values.min() < values.max() / 10)


def _tidy(axes: Axes) -> None:
    axes.tick_params(which="both", labelsize=8, colors=_INK, length=3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "right", "bottom"):
        axes.spines[side].set_color(_FAINT)


def plot_boundaries(marked: MarkedText, target: Path) -> None:
    """Writes a PNG: bytes in a row, a bar of p above each, learned cuts as lines and gold ones as marks.

    ValueError for a text without a byte or entries of another length.
    """
    size = len(marked.text)
    if not size or any(len(part) != size for part in (marked.p, marked.learned, marked.gold)):
        lengths = [len(part) for part in (marked.p, marked.learned, marked.gold)]
        raise ValueError(f"{size} bytes with {lengths} entries; expected at least one byte and an entry for each")
    lines = -(-size // BYTES_OF_A_LINE)
    figure = Figure(figsize=(13.0, 0.7 + 1.55 * lines), dpi=130, layout="constrained")
    for number, axes in enumerate(figure.subplots(lines, 1, squeeze=False)[:, 0]):
        first = number * BYTES_OF_A_LINE
        _draw_strip(axes, marked, first, min(size, first + BYTES_OF_A_LINE))
    figure.legend(handles=_boundary_legend(), loc="outside upper left", ncols=6, frameon=False, fontsize=9)
    save_figure(figure, target)


def _draw_strip(axes: Axes, marked: MarkedText, first: int, last: int) -> None:
    for index in range(first, last):
        x, learned, gold = index - first, marked.learned[index], marked.gold[index]
        colour = (_HIT if gold else _EXTRA) if learned else (_MISSED if gold else _FAINT)
        axes.bar(x, marked.p[index], width=0.72, color=colour, zorder=2)
        if learned:
            axes.plot([x + 0.5, x + 0.5], [-0.52, 1.05], color=colour, lw=1.2, zorder=3)
        if gold:
            axes.plot(x + 0.5, -0.60, marker="^", ms=5, color=_HIT if learned else _MISSED, clip_on=False, zorder=4)
    for start, stop, label in characters(marked.text):
        if first <= start < last:
            middle = (start + min(stop, last) - 1) / 2 - first
            axes.text(middle, -0.27, label, ha="center", va="center", fontsize=11, family="monospace", color=_INK,
                      parse_math=False)  # fmt: skip
    axes.plot([-0.7, last - first - 0.3], [0.5, 0.5], color=_INK, lw=0.6, ls=(0, (4, 4)), alpha=0.5, zorder=1)
    axes.set_xlim(-0.7, BYTES_OF_A_LINE - 0.3)
    axes.set_ylim(-0.70, 1.08)
    axes.set_yticks([0, 0.5, 1], ["0", "½", "1"], fontsize=8, color=_INK)
    axes.set_ylabel("p", fontsize=9, color=_INK, rotation=0, labelpad=8)
    axes.set_xticks([])
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)
    axes.spines["left"].set_color(_FAINT)
    axes.spines["left"].set_bounds(0, 1)


def _boundary_legend() -> list[Any]:
    return [
        Patch(color=_HIT, label="boundary of both"),
        Patch(color=_EXTRA, label="learned only"),
        Patch(color=_MISSED, label="gold only"),
        Patch(color=_FAINT, label="no boundary"),
        Line2D([], [], color=_INK, lw=1.2, label="learned cut"),
        Line2D([], [], color=_INK, marker="^", ls="none", ms=5, label="gold cut (token ends)"),
    ]


def characters(text: bytes) -> list[tuple[int, int, str]]:
    """(first byte, one past the last, how to show it) of each character; a byte that is in none is shown in hex."""
    result = []
    position = 0
    while position < len(text):
        for size in (1, 2, 3, 4):
            try:
                character = text[position : position + size].decode("utf-8")
            except UnicodeDecodeError:
                continue
            break
        else:
            size, character = 1, f"{text[position]:02X}"
        result.append(
            (position, position + size, {" ": "␣", "\n": "↵", "\t": "→", "\r": "↵"}.get(character, character))
        )
        position += size
    return result


def save_figure(figure: Figure, target: Path) -> None:
    """Writes a PNG; the folder is made where it is missing."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        # scripts the font lacks are drawn as boxes
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        FigureCanvasAgg(figure).print_figure(str(target), format="png")
