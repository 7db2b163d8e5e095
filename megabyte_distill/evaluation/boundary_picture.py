"""A picture of a sentence with its learned boundaries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from megabyte_distill.evaluation.marked_text import MarkedText, split_characters
from megabyte_distill.evaluation.png import FAINT, INK, save_figure

_HIT, _MISSED, _EXTRA = "#2f7d5b", "#e08a1e", "#c0392b"
BYTES_OF_A_LINE = 64
"""Bytes of a sentence in one strip."""


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
        colour = (_HIT if gold else _EXTRA) if learned else (_MISSED if gold else FAINT)
        axes.bar(x, marked.p[index], width=0.72, color=colour, zorder=2)
        if learned:
            axes.plot([x + 0.5, x + 0.5], [-0.52, 1.05], color=colour, lw=1.2, zorder=3)
        if gold:
            axes.plot(x + 0.5, -0.60, marker="^", ms=5, color=_HIT if learned else _MISSED, clip_on=False, zorder=4)
    for start, stop, label in characters(marked.text):
        if first <= start < last:
            middle = (start + min(stop, last) - 1) / 2 - first
            axes.text(middle, -0.27, label, ha="center", va="center", fontsize=11, family="monospace", color=INK,
                      parse_math=False)  # fmt: skip
    axes.plot([-0.7, last - first - 0.3], [0.5, 0.5], color=INK, lw=0.6, ls=(0, (4, 4)), alpha=0.5, zorder=1)
    axes.set_xlim(-0.7, BYTES_OF_A_LINE - 0.3)
    axes.set_ylim(-0.70, 1.08)
    axes.set_yticks([0, 0.5, 1], ["0", "½", "1"], fontsize=8, color=INK)
    axes.set_ylabel("p", fontsize=9, color=INK, rotation=0, labelpad=8)
    axes.set_xticks([])
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)
    axes.spines["left"].set_color(FAINT)
    axes.spines["left"].set_bounds(0, 1)


def _boundary_legend() -> list[Any]:
    return [
        Patch(color=_HIT, label="boundary of both"),
        Patch(color=_EXTRA, label="learned only"),
        Patch(color=_MISSED, label="gold only"),
        Patch(color=FAINT, label="no boundary"),
        Line2D([], [], color=INK, lw=1.2, label="learned cut"),
        Line2D([], [], color=INK, marker="^", ls="none", ms=5, label="gold cut (token ends)"),
    ]


def characters(text: bytes) -> list[tuple[int, int, str]]:
    """(first byte, one past the last, how to show it) of each character; a byte that is in none is shown in hex."""
    shown = {" ": "␣", "\n": "↵", "\t": "→", "\r": "↵"}
    return [
        (start, stop, f"{text[start]:02X}" if character is None else shown.get(character, character))
        for start, stop, character in split_characters(text)
    ]
