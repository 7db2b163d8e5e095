"""Writes one HTML report about a training run, or about several side by side, and its pictures as PNG files.

    python tools/plot_run.py RUN
    python tools/plot_run.py RUN OTHER --output DIR
    python tools/plot_run.py RUN --no-model

Losses, learning rates, bits per byte, boundary F1, bytes per chunk and throughput by stage, a page of held-out text
with the tokenizer's and the learned boundaries, a sample, settings and versions. The report is one file that needs no
other. A run that is being trained may be read too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

from megabyte_distill.config import ranges
from megabyte_distill.data.named_sets import set_problems
from megabyte_distill.data.progress import shown
from megabyte_distill.run_folder import require_run, run_names
from megabyte_distill.tool import ToolParser, folder_to_write, in_range, judged, problems_of, run_tool, typed


def build_parser() -> ToolParser:
    """The command line."""
    parser = ToolParser(description=__doc__)
    report = parser.add_argument_group("runs and report")
    report.add_argument("runs", type=Path, nargs="+", default=[], metavar="RUN", help="folders of training runs")
    report.add_argument("--output", type=judged(folder_to_write), metavar="DIR",
        help="for report.html and PNG files (the run's folder; of several comparison/ beside the first)")  # fmt: skip
    page = parser.add_argument_group("page of held-out text", "needs the student's weights, unlike the rest")
    page.add_argument("--text-bytes", type=in_range(ranges.SIZE), default=2000, metavar="N",
        help="bytes of text; 0 leaves the page out (2000)")  # fmt: skip
    page.add_argument("--no-model", action="store_true", help="load no weights: the same as --text-bytes 0")
    page.add_argument("--data-path", nargs="+", default=[], metavar="STEM",
        help="text to show, PREFIX_KEY_document (default: what the run was validated on)")  # fmt: skip
    return parser


def check(arguments: argparse.Namespace) -> Iterable[str]:
    """What is wrong with the flags together, and with the folders and data sets they name."""
    folders = [problem for root in arguments.runs for problem in problems_of("RUN", partial(require_run, root))]
    yield from folders or problems_of("RUN", partial(run_names, arguments.runs))
    yield from set_problems(arguments.data_path)
    without = "{flag}: %s leaves the page out; leave out one of the two"
    if arguments.text_bytes == 0:
        yield from typed(arguments, ["--data-path"], without % "--text-bytes 0")
    elif arguments.no_model:
        yield from typed(arguments, ["--text-bytes", "--data-path"], without % "--no-model")


def run(arguments: argparse.Namespace) -> None:
    """Writes the report and prints its path; ValueError for what the user can mend."""
    text_bytes = 0 if arguments.no_model else arguments.text_bytes
    roots: list[Path] = arguments.runs
    # megatron takes seconds to import, which --help should not
    from megabyte_distill.evaluation.run_report import HeldOutPage, write_report
    from megabyte_distill.parallel.process_groups import world
    from megabyte_distill.pretrain.held_out_page import held_out_page
    from megabyte_distill.pretrain.run_records import run_record

    names = run_names(roots)
    pages = [HeldOutPage(missing="left out: --no-model or --text-bytes 0")] * len(roots)
    if text_bytes:
        with world():
            pages = [
                held_out_page(root, text_bytes=text_bytes, data_path=arguments.data_path, show=shown) for root in roots
            ]
    records = [run_record(root, name, page) for root, name, page in zip(roots, names, pages, strict=True)]
    for record in records:
        for problem in (*record.notes, record.page.missing if text_bytes else ""):
            if problem:
                print(f"{record.name}: {problem}", file=sys.stderr)
    files = write_report(records, arguments.output or default_folder(roots))
    print(f"written: {files[0]} and {len(files) - 1} pictures beside it")


def default_folder(roots: Sequence[Path]) -> Path:
    """Where a report goes that was given no folder."""
    return roots[0] if len(roots) == 1 else roots[0].resolve().parent / "comparison"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_tool(build_parser(), run, argv, check=check)


if __name__ == "__main__":
    sys.exit(main())
