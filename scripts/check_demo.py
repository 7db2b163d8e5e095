"""Checks what `make demo` reached against its floors.

    python scripts/check_demo.py runs/tiny

A line a figure of RUN/summary.json. Exit code 0, 1 where a figure is below its floor, or 2 with one line that begins
with "error:".
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from megabyte_distill.tool import ToolParser, run_tool

FLOORS = {"retention": 0.86, "stage1_retention": 0.95, "boundary_f1": 0.90}
"""Of the tiny preset on the embedded teacher and text (docs/results.md)."""


def below_floor(run: Path) -> bool:
    """Prints each figure beside its floor; whether one is below. ValueError where the run has no such figure."""
    summary = run / "summary.json"
    if not summary.is_file():
        raise ValueError(f"{summary} is not there; it is written at the end of `make demo`")
    found = json.loads(summary.read_text(encoding="utf-8"))
    if absent := [name for name in FLOORS if found.get(name) is None]:
        raise ValueError(f"{summary} has no {', '.join(absent)}; it needs all five stages and --summary-bytes above 0")
    for name, floor in FLOORS.items():
        verdict = "ok" if found[name] >= floor else "BELOW"
        print(f"{name:18} {found[name]:.4f}  floor {floor:.2f}  {verdict}")
    return any(found[name] < floor for name, floor in FLOORS.items())


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = ToolParser(description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of the run, runs/tiny for `make demo`")
    failed = []

    def run(arguments: argparse.Namespace) -> None:
        failed.append(below_floor(arguments.run))

    return run_tool(parser, run, argv) or int(any(failed))


if __name__ == "__main__":
    sys.exit(main())
