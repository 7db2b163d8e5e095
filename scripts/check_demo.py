"""Checks what `make demo` reached against its floors.

    python scripts/check_demo.py runs/tiny

A line a figure of RUN/summary.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from megabyte_distill.tool import Failure, ToolParser, run_tool

FLOORS = {"retention": 0.86, "stage1_retention": 0.95, "boundary_f1": 0.90}
"""Of the tiny preset on the embedded teacher and text (docs/results.md)."""


def build_parser() -> ToolParser:
    """The command line."""
    parser = ToolParser(description=__doc__, failure="a figure is below its floor")
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of the run, runs/tiny for `make demo`")
    return parser


def run(options: argparse.Namespace) -> None:
    """Prints each figure beside its floor.

    Failure where one is below; ValueError where the run has no such figure, or was trained on since they were written.
    """
    summary = options.run / "summary.json"
    if not summary.is_file():
        raise ValueError(f"{summary} is not there; it is written at the end of `make demo`")
    written = summary.stat().st_mtime_ns
    for saved in options.run.glob("*/latest_checkpointed_iteration.txt"):
        if saved.stat().st_mtime_ns > written:
            raise ValueError(
                f"{summary} is older than {saved}: training went on and was stopped; run `make demo` again"
            )
    found = json.loads(summary.read_text(encoding="utf-8"))
    if absent := [name for name in FLOORS if found.get(name) is None]:
        raise ValueError(f"{summary} has no {', '.join(absent)}; it needs all five stages and --summary-bytes above 0")
    for name, floor in FLOORS.items():
        verdict = "ok" if found[name] >= floor else "BELOW"
        print(f"{name:18} {found[name]:.4f}  floor {floor:.2f}  {verdict}")
    if below := [name for name, floor in FLOORS.items() if not found[name] >= floor]:
        raise Failure(f"{', '.join(below)} of {options.run} below the floor")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_tool(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
