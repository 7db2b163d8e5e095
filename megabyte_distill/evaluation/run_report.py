"""One HTML file about one run or several side by side, with nothing outside it, and its pictures as PNG files."""

from __future__ import annotations

import base64
import datetime
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megabyte_distill.evaluation.marked_text import MarkedText
from megabyte_distill.evaluation.metrics_log import VALIDATION, Curves
from megabyte_distill.evaluation.png import png_of
from megabyte_distill.evaluation.report_style import STYLE
from megabyte_distill.evaluation.report_text import counts, escaped, page_html
from megabyte_distill.evaluation.run_plots import PICTURES, draw
from megabyte_distill.files import partial_path, publish, write_and_sync

REPORT_FILE = "report.html"
TITLES = {
    "losses": "Losses, learning rate and gradient norm",
    "bits_per_byte": "Bits per byte",
    "boundary_f1": "Boundary F1",
    "bytes_per_chunk": "Bytes per chunk",
    "throughput": "Throughput",
    "target_shares": "Shares of the exact targets",
}
WHY_MISSING = {
    "bits_per_byte": "recorded by 1b on held-out text, and from 2a on",
    "boundary_f1": "recorded where the router is trained: 1c, 2b and 3a",
    "bytes_per_chunk": "recorded where the router is trained (1c, 2b, 3a) or chunks are merged; formerly only there",
}
"""Pictures that a reader looks for, and why a run may lack them."""
FIGURES = {
    "text_bytes": "held-out text, bytes",
    "teacher_bits_per_byte": "teacher, bits per byte",
    "student_bits_per_byte": "student, bits per byte",
    "gold_bits_per_byte": "student under gold bits",
    "merged_bits_per_byte": "student under merged bits",
    "router_bits_per_byte": "student under the router's bits",
    "stage1_bits_per_byte": "reading bytes through 1b's token head",
    "retention": "retention, teacher's over student's",
    "stage1_retention": "retention of stage 1",
    "boundary_precision": "boundary precision",
    "boundary_recall": "boundary recall",
    "boundary_f1": "boundary F1",
    "bytes_per_chunk": "bytes per chunk, as taught",
    "router_bytes_per_chunk": "bytes per chunk, the router's",
    "next_byte_accuracy": "next byte was the likeliest",
    "alignment_mse_relative": "relative alignment error after 1a",
    "unigram_bits_per_byte": "anchor: token unigram",
    "constant_embedding_bits_per_byte": "anchor: teacher on a constant embedding",
    "seconds": "time in updates, s",
}
"""Entries of summary.json that are shown, and their names."""


@dataclass(frozen=True, kw_only=True)
class StageRecord:
    """How far a stage came, and the settings of its newest checkpoint; these are empty where they cannot be read."""

    stage: str
    iteration: int
    train_iters: int
    consumed_bytes: int
    seconds: float
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The stage's own, by name."""


@dataclass(frozen=True, kw_only=True)
class HeldOutPage:
    """A page of held-out text as a run's student cuts it, or why there is none."""

    texts: Sequence[MarkedText] = ()
    source: str = ""
    """Which stage, which data."""
    missing: str = ""


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """All that a report says of a run."""

    name: str
    folder: str
    curves: Curves
    summary: Mapping[str, Any] | None
    """summary.json, None where there is none."""
    stages: Sequence[StageRecord]
    settings: Mapping[str, Any]
    """By dotted name, those that all stages share."""
    versions: Mapping[str, str]
    page: HeldOutPage
    boundaries: bytes | None = None
    """A PNG of a sentence with its boundaries."""
    notes: Sequence[str] = ()
    """What could not be read, and what to know."""


def write_report(runs: Sequence[RunRecord], folder: Path) -> list[Path]:
    """Writes report.html and its pictures, which are in it too; returns their paths, the report first.

    Each file is complete or what it was before. The folder is made where it is missing. OSError where it cannot be.
    """
    curves = {run.name: run.curves for run in runs}
    figures = {name: draw(curves, kinds) for name, kinds in PICTURES.items()}
    pictures = {name: png_of(figure) for name, figure in figures.items() if figure is not None}
    document = report_html(runs, pictures)
    folder.mkdir(parents=True, exist_ok=True)
    files = {REPORT_FILE: document.encode("utf-8", errors="replace")}
    files |= {f"{name}.png": picture for name, picture in pictures.items()}
    try:
        for name, content in files.items():
            write_and_sync(partial_path(folder / name), content)
        for name in files:
            publish(folder / name)
    finally:
        for name in files:
            partial_path(folder / name).unlink(missing_ok=True)
    return [folder / name for name in files]


def report_html(runs: Sequence[RunRecord], pictures: Mapping[str, bytes]) -> str:
    """The document. ``pictures``: name as in run_plots.PICTURES → PNG of all runs."""
    title = "megabyte-distill: " + ", ".join(run.name for run in runs)
    written = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            # nothing is fetched, whatever the text in it says
            '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
            "style-src 'unsafe-inline'\">",
            '<meta name="viewport" content="width=device-width">',
            f"<title>{escaped(title)}</title><style>{STYLE}</style></head><body>",
            f'<h1>{escaped(title)}</h1><p class="faint">written {written}</p>',
            _side_by_side(runs, _head),
            *_section("Held-out figures", _figures(runs)),
            *_section("Stages", _side_by_side(runs, _stage_table)),
            *(line for name, title in TITLES.items() for line in _picture(name, title, pictures)),
            *_section("Held-out text and its boundaries", LEGEND + _side_by_side(runs, _page)),
            *_section("Samples", _side_by_side(runs, _samples)),
            *_section("Settings", _settings(runs)),
            *_section("Versions", _rows_of_runs(runs, [run.versions for run in runs])),
            "</body></html>\n",
        ]
    )


LEGEND = (
    '<p class="legend"><span>a<i class="both"></i> boundary of both</span><span>a<i class="learned"></i> learned only'
    '</span><span>a<i class="gold"></i> gold only: a teacher\'s token, or a merged chunk, ends</span></p>'
)


def _section(title: str, content: str) -> list[str]:
    return [f"<h2>{escaped(title)}</h2>", content]


def _side_by_side(runs: Sequence[RunRecord], part: Callable[[RunRecord], str]) -> str:
    headings = [f"<h3>{escaped(run.name)}</h3>" if len(runs) > 1 else "" for run in runs]
    parts = [f"<div>{heading}{part(run)}</div>" for heading, run in zip(headings, runs, strict=True)]
    return f'<div class="runs">{"".join(parts)}</div>'


def _head(run: RunRecord) -> str:
    notes = "".join(f"<li>{escaped(note)}</li>" for note in run.notes)
    return f"<p><code>{escaped(run.folder)}</code></p>" + (f'<ul class="notes">{notes}</ul>' if notes else "")


def _table(header: Iterable[str], rows: Iterable[Iterable[str]], *, different: Iterable[bool] = ()) -> str:
    """Cells are escaped here; rows that are ``different`` stand out."""
    marks = list(different)
    lines = ["<table><tr>" + "".join(f"<th>{escaped(cell)}</th>" for cell in header) + "</tr>"]
    for number, row in enumerate(rows):
        first, *rest = row
        style = ' class="different"' if number < len(marks) and marks[number] else ""
        lines.append(
            f"<tr{style}><th>{escaped(first)}</th>" + "".join(f"<td>{escaped(c)}</td>" for c in rest) + "</tr>"
        )
    return "\n".join([*lines, "</table>"])


def _rows_of_runs(runs: Sequence[RunRecord], values: Sequence[Mapping[str, Any]]) -> str:
    """A row a name, a column a run; names that runs do not share or differ in stand out."""
    names = list(dict.fromkeys(name for of_run in values for name in of_run))
    if not names:
        return '<p class="faint">none are recorded yet; they are written with the first checkpoint</p>'
    rows = [[name, *(_shown(of_run[name]) if name in of_run else "–" for of_run in values)] for name in names]
    return _table(
        ["", *(run.name for run in runs)], rows, different=[len(set(row[1:])) > 1 for row in rows]
    )  # fmt: skip


def _shown(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return f"{value:.6g}"
    return json.dumps(value, ensure_ascii=False)


def _figures(runs: Sequence[RunRecord]) -> str:
    values = []
    for run in runs:
        summary = run.summary or {}
        values.append(
            {label: _figure(summary[name]) for name, label in FIGURES.items() if summary.get(name) is not None}
        )
    if not any(values):
        return (
            '<p class="faint">no summary.json: a run writes it at its end, when its decoder is trained and '
            "--summary-bytes is not 0</p>"
        )
    names = [label for label in FIGURES.values() if any(label in of_run for of_run in values)]
    return _table(["", *(run.name for run in runs)], [[name, *(v.get(name, "–") for v in values)] for name in names])


def _figure(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4f}" if isinstance(value, float) else str(value)


def _stage_table(run: RunRecord) -> str:
    saved = {record.stage: record for record in run.stages}
    rows = []
    for stage in dict.fromkeys([*run.curves, *saved]):
        record, curves = saved.get(stage), run.curves.get(stage, {})
        recorded = max((max(series.points) for series in curves.values() if series.points), default=0)
        measures = []
        for name, series in curves.items():
            if name.startswith(VALIDATION) and series.points:
                measures.append(f"{name.removeprefix(VALIDATION)} {series.last:.4f}")
        rows.append(
            [
                stage,
                f"{recorded:,}",
                "–" if record is None else f"{record.iteration:,} of {record.train_iters:,}",
                "–" if record is None else f"{record.consumed_bytes:,}",
                "–" if record is None else str(datetime.timedelta(seconds=round(record.seconds))),
                ", ".join(measures) or "–",
            ]
        )
    header = ("stage", "updates recorded", "updates saved", "bytes seen", "time", "last held-out figures")
    return _table(header, rows) if rows else '<p class="faint">nothing is recorded yet</p>'


def _picture(name: str, title: str, pictures: Mapping[str, bytes]) -> list[str]:
    if name in pictures:
        return _section(title, _image(pictures[name], title))
    why = WHY_MISSING.get(name)
    return _section(title, f'<p class="faint">not in the metrics: {escaped(why)}</p>') if why else []


def _image(content: bytes, what: str) -> str:
    return f'<img alt="{escaped(what)}" src="data:image/png;base64,{base64.b64encode(content).decode()}">'


def _page(run: RunRecord) -> str:
    picture = "" if run.boundaries is None else _image(run.boundaries, "a sentence with the router's p")
    if not run.page.texts:
        return f'{picture}<p class="faint">{escaped(run.page.missing or "no text was read")}</p>'
    found = counts(run.page.texts)
    line = f"{run.page.source}: {found['both']} of both, {found['learned']} learned only, {found['gold']} gold only"
    return f'{picture}<p class="faint">{escaped(line)}</p>{page_html(run.page.texts)}'


def _samples(run: RunRecord) -> str:
    summary = run.summary or {}
    samples = summary.get("samples") or [summary.get("sample")]
    shown = [f'<div class="text" dir="auto">{escaped(sample)}</div>' for sample in samples if isinstance(sample, str)]
    return "\n".join(shown) or '<p class="faint">none: the summary of a finished run has some</p>'


def _settings(runs: Sequence[RunRecord]) -> str:
    shared = _rows_of_runs(runs, [run.settings for run in runs])
    columns = [(run, record) for run in runs for record in run.stages if record.settings]
    if not columns:
        return shared
    names = list(dict.fromkeys(name for _, record in columns for name in record.settings))
    rows = [[name, *(_shown(record.settings.get(name, "–")) for _, record in columns)] for name in names]
    header = [f"{run.name} {record.stage}" if len(runs) > 1 else record.stage for run, record in columns]
    stages = _table(["", *header], rows, different=[len(set(row[1:])) > 1 for row in rows])
    return (
        f"<details open><summary>of each stage</summary>{stages}</details>"
        f"<details><summary>of all stages</summary>{shared}</details>"
    )
