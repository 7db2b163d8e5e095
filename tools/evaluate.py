"""Compares a run's student with its teacher on held-out text.

    python tools/evaluate.py --load RUN --data-path data/heldout_text_document --json
    python tools/evaluate.py --load RUN OTHER --data-path en=data/en_text_document de=data/de_text_document --plots DIR
    python tools/evaluate.py --load RUN --data-path data/heldout_text_document --suite robustness

Bits per byte of both, retention, boundaries, next bytes, and anchors, with confidence intervals over documents; or what
noise, cut prompts, tasks on characters and other scripts do to both.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megabyte_distill.config import ranges
from megabyte_distill.config.blend import parse_split
from megabyte_distill.config.stage import TRAINS_DECODER
from megabyte_distill.data.named_sets import set_names, set_problems
from megabyte_distill.data.progress import shown
from megabyte_distill.run_folder import find_run_teacher, require_run, require_stage
from megabyte_distill.tool import (
    ToolParser,
    choice,
    folder_to_read,
    folder_to_write,
    in_range,
    judged,
    problems_of,
    run_tool,
    typed,
)

if TYPE_CHECKING:
    from megabyte_distill.data.dataset import ByteTokenDataset
    from megabyte_distill.data.token_bytes import TokenBytes
    from megabyte_distill.evaluation.bits_per_byte import Comparison, Measures
    from megabyte_distill.evaluation.bootstrap import Bootstrap
    from megabyte_distill.evaluation.robustness import Budget, Section

_OF_HELD_OUT = (
    "--train-data-path", "--seq-length", "--max-bytes", "--bits", "--boundary-threshold", "--boundary-thresholds",
    "--scoring", "--tokenizations", "--path-bytes",
)  # fmt: skip
_OF_ROBUSTNESS = ("--suite-texts", "--suite-questions", "--suite-samples")


def build_parser() -> ToolParser:
    """The command line."""
    parser = ToolParser(description=__doc__)
    source = parser.add_argument_group("models and text").add_argument
    source("--load", type=Path, nargs="+", required=True, default=[], metavar="RUN",
        help="training runs; several stand side by side")  # fmt: skip
    source(
        "--stage",
        **choice(*TRAINS_DECODER, hint="earlier stages leave the decoder untrained"),
        help="stage whose weights are taken (default: the last complete one)",
    )
    source("--teacher", type=judged(folder_to_read), metavar="CKPT",
        help="the teacher's checkpoint, where it moved (default: as the run recorded it)")  # fmt: skip
    source("--data-path", nargs="+", required=True, default=[], metavar="[NAME=]STEM",
        help="held-out data sets, PREFIX_KEY_document; each is a row of the table")  # fmt: skip
    source("--split", type=judged(parse_split), metavar="T,V,S",
        help="score only the validation share V of each set, as held out by training (default: all)")  # fmt: skip
    source("--max-documents", type=in_range(ranges.COUNT), metavar="N",
        help="documents at most of each data set (default: all)")  # fmt: skip
    add = parser.add_argument_group("what is measured").add_argument
    add("--suite", **choice("heldout", "robustness"), default="heldout",
        help="the comparison on held-out text, or what damages and tasks do to both models (heldout)")  # fmt: skip
    add("--paths", type=in_range(ranges.SIZE), default=4, metavar="K",
        help="bit histories of figures without a tokenizer; 0 leaves them out (4)")  # fmt: skip
    add("--resamples", type=in_range(ranges.SIZE), default=1000, metavar="N",
        help="draws for confidence intervals; 0 makes none (1000)")  # fmt: skip
    add("--confidence", type=in_range(ranges.SHARE), default=0.95, metavar="C",
        help="share of draws inside an interval (0.95)")  # fmt: skip
    add("--seed", type=in_range(ranges.SEED), default=0, metavar="N", help="of all that is drawn (0)")
    _add_held_out(parser.add_argument_group("--suite heldout").add_argument)
    _add_robustness(parser.add_argument_group("--suite robustness").add_argument)
    output = parser.add_argument_group("output").add_argument
    output("--json", action="store_true", help="print one JSON object (default: tables)")
    output("--plots", type=judged(folder_to_write), metavar="DIR",
        help="draw PNG pictures into this folder and name them on stderr (default: none)")  # fmt: skip
    return parser


def _add_held_out(add: Any) -> None:
    add("--train-data-path", nargs="+", metavar="STEM",
        help="training data, for the token unigram anchor (default: no such anchor)")  # fmt: skip
    add("--seq-length", type=in_range(ranges.Range(low=2, whole=True)), default=2048, metavar="N",
        help="bytes of a row: the context of all figures (2048)")  # fmt: skip
    add("--max-bytes", type=in_range(ranges.COUNT), metavar="N",
        help="bytes of text, shared evenly by the sets; the row of --seq-length that reaches a set's share is read "
        "whole, so that there is up to a row more, and less where a set's documents end first (default: all)",
    )  # fmt: skip
    add("--bits", **choice("gold", "router", "merged"),
        help="bits of the headline figures, as input and label (what it was taught: gold or merged)")  # fmt: skip
    add("--boundary-threshold", type=in_range(ranges.BOUNDARY_THRESHOLD), default=0.5, metavar="T",
        help="the router ends a chunk where its p is above this, in all figures under its bits (0.5)")  # fmt: skip
    add("--boundary-thresholds", type=judged(ranges.BOUNDARY_THRESHOLD.read_several), metavar="T,T,...",
        help="a table of quality and backbone steps per byte along these, as 0.3,0.5,0.7 (none)")  # fmt: skip
    add("--scoring", **choice("joint", "official"), default="joint",
        help="official adds the paper's score, which is no bound (joint)")  # fmt: skip
    add("--tokenizations", type=in_range(ranges.SIZE), default=0, metavar="K",
        help="with --paths, the teacher summed over K tokenizations of the same text (0: left out)")  # fmt: skip
    add("--path-bytes", type=in_range(ranges.COUNT), default=20_000, metavar="N",
        help="bytes of text for the figures by --paths, about: a set's even share is rounded to openings of 1,024 "
        "bytes, at least one, each cut at the last token's end in it or its document's (20000)")  # fmt: skip


def _add_robustness(add: Any) -> None:
    for flag, default, what in (
        ("--suite-texts", 12, "pieces of text that are noised and cut"),
        ("--suite-questions", 24, "questions of each task on characters"),
        ("--suite-samples", 4, "samples of each of ten scripts"),
    ):
        add(flag, type=in_range(ranges.COUNT), default=default, metavar="N", help=f"{what} ({default})")


def check(arguments: argparse.Namespace) -> Iterable[str]:
    """What is wrong with the flags together, and with the folders and data sets they name."""
    for root in arguments.load:
        problems = problems_of("--load", partial(require_run, root))
        if not problems and arguments.stage is not None:
            problems = problems_of("--stage", partial(require_stage, root, arguments.stage))
        yield from problems or problems_of("--teacher", partial(find_run_teacher, root, arguments.teacher))
    if len(set(arguments.load)) < len(arguments.load):
        yield f"--load: got {' '.join(map(str, arguments.load))}, expected each run once"
    yield from set_problems(arguments.data_path, named=True)
    yield from set_problems(arguments.train_data_path or (), "--train-data-path")
    is_robustness = arguments.suite == "robustness"
    others = _OF_HELD_OUT if is_robustness else _OF_ROBUSTNESS
    other = "heldout" if is_robustness else "robustness"
    yield from typed(arguments, others, f"{{flag}}: only --suite {other} reads it; give that, or leave {{flag}} out")
    if not arguments.paths and is_robustness:
        yield "--paths: got 0, expected at least 1; --suite robustness reads along paths"
    elif not arguments.paths:
        without = "{flag}: is for the figures by --paths, which --paths 0 leaves out; leave out one of the two"
        yield from typed(arguments, ["--path-bytes", "--tokenizations"], without)
    if not arguments.resamples:
        without = "{flag}: is for the intervals, which --resamples 0 leaves out; leave out one of the two"
        yield from typed(arguments, ["--confidence"], without)


def run(arguments: argparse.Namespace) -> None:
    """Evaluates and prints; ValueError for what the user can mend."""
    # megatron takes seconds to import, which --help and a mistyped flag should not
    from megabyte_distill.parallel.process_groups import world

    with world():
        if arguments.suite == "robustness":
            robustness(arguments)
        else:
            held_out(arguments)


def held_out(arguments: argparse.Namespace) -> None:
    """The suite of the same name, printed; needs process groups."""
    from megabyte_distill.evaluation import report

    comparisons = {str(root): compare(arguments, root) for root in arguments.load}
    if arguments.json:
        objects = [as_json(arguments, name, found) for name, found in comparisons.items()]
        print(json.dumps(objects[0] if len(objects) == 1 else {"runs": objects}, indent=2))
        return
    for name, found in comparisons.items():
        print(f"{name}: {report.table(found)}" if len(comparisons) > 1 else report.table(found))
    if len(comparisons) > 1:
        print(f"\n{report.run_table(comparisons)}")


def robustness(arguments: argparse.Namespace) -> None:
    """The suite of the same name, printed; needs process groups."""
    from megabyte_distill.evaluation.robustness import Budget, suite_table

    budget = Budget(texts=arguments.suite_texts, questions=arguments.suite_questions, samples=arguments.suite_samples)
    found = {str(root): measure_robustness(arguments, root, budget) for root in arguments.load}
    if arguments.json:
        asked = {"suite": arguments.suite, "paths": arguments.paths, "budget": asdict(budget)}
        objects = [
            {
                "run": name,
                **asked,
                "bootstrap": asdict(bootstrap_of(arguments)),
                "sections": list(map(asdict, sections)),
            }
            for name, sections in found.items()
        ]
        print(json.dumps(objects[0] if len(objects) == 1 else {"runs": objects}, indent=2))
        return
    for name, sections in found.items():
        print(f"{name}:\n{suite_table(sections)}" if len(found) > 1 else suite_table(sections))


def measure_robustness(arguments: argparse.Namespace, root: Path, budget: Budget) -> list[Section]:
    """Loads a run and puts its student and its teacher through the suite; needs process groups."""
    from megabyte_distill.conversion.tokenizer_files import TOKENIZER_FOLDER
    from megabyte_distill.data import tokenizers
    from megabyte_distill.evaluation.readers import StudentReader, TeacherReader
    from megabyte_distill.evaluation.robustness import run_suite
    from megabyte_distill.runs import load_run_teacher, load_student, speaking_stage

    bootstrap, limit = bootstrap_of(arguments), arguments.max_documents
    loaded = load_student(root, speaking_stage(root, arguments.stage))
    if loaded.student.is_official:
        raise ValueError(f"{root}: official dechunk looks one byte ahead; --suite robustness steps, which it cannot")
    teacher = load_run_teacher(root, arguments.teacher)
    datasets = open_sets(arguments, loaded.token_bytes).values()
    sections = run_suite(
        TeacherReader(teacher.backbone, tokenizers.load(root / TOKENIZER_FOLDER), teacher.token_bytes),
        StudentReader(loaded.student, paths=arguments.paths),
        [dataset.subset(dataset.documents[:limit]) for dataset in datasets],
        budget,
        bootstrap=bootstrap,
        show=shown,
    )
    if arguments.plots is not None:
        from megabyte_distill.evaluation.comparison_plots import plot_robustness

        picture = plot_folder(arguments, root) / "robustness.png"
        plot_robustness(sections, picture)
        say_written(picture)
    return sections


def bootstrap_of(arguments: argparse.Namespace) -> Bootstrap:
    """How intervals are made."""
    from megabyte_distill.evaluation.bootstrap import Bootstrap

    return Bootstrap(resamples=arguments.resamples, confidence=arguments.confidence, seed=arguments.seed)


def measures_of(arguments: argparse.Namespace, merge_limit: float | None) -> Measures:
    """What is to be measured of a student whose stage merged tokens so; ValueError for bits that it was not taught."""
    from megabyte_distill.evaluation.bits_per_byte import Measures, headline_bits
    from megabyte_distill.evaluation.document_counts import Bits

    if arguments.bits == Bits.MERGED and merge_limit is None:
        raise ValueError("--bits merged: the student was not trained with --target-bytes-per-chunk; leave it out")
    return Measures(
        bits=headline_bits(merge_limit) if arguments.bits is None else Bits(arguments.bits),
        merge_limit=merge_limit,
        official=arguments.scoring == "official",
        paths=arguments.paths,
        path_bytes=arguments.path_bytes,
        tokenizations=arguments.tokenizations,
        threshold=arguments.boundary_threshold,
        thresholds=arguments.boundary_thresholds or (),
        bootstrap=bootstrap_of(arguments),
    )


def compare(arguments: argparse.Namespace, root: Path) -> Comparison:
    """Loads a run and compares its student with its teacher; needs process groups."""
    from megabyte_distill.data.chunk_merging import merge_row
    from megabyte_distill.data.dataset import open_blend
    from megabyte_distill.evaluation import bits_per_byte
    from megabyte_distill.evaluation.anchors import token_counts, unigram_nll
    from megabyte_distill.evaluation.held_out import held_out_rows
    from megabyte_distill.runs import chunk_limit, load_run_teacher, load_students, speaking_stage

    students = load_students(root, speaking_stage(root, arguments.stage))
    loaded = students.last
    merge_limit = chunk_limit(loaded.checkpoint)
    measures = measures_of(arguments, merge_limit)
    teacher = load_run_teacher(root, arguments.teacher)
    sets = open_sets(arguments, loaded.token_bytes)
    unigram = None
    if arguments.train_data_path:
        training = open_blend(arguments.train_data_path, tokenizer_hash=loaded.token_bytes.hash)
        unigram = unigram_nll(token_counts(training.datasets), loaded.token_bytes)
    limit = arguments.max_bytes
    rows_of_set = {
        name: held_out_rows(
            [dataset],
            row_bytes=arguments.seq_length,
            max_bytes=None if limit is None else -(-limit // len(sets)),
            max_documents=arguments.max_documents,
        )
        for name, dataset in sets.items()
    }
    found = bits_per_byte.compare(
        loaded.student,
        teacher.backbone,
        rows_of_set,
        measures,
        stage1_student=students.distilled,
        aligned_student=students.aligned,
        unigram=unigram,
        token_bytes=teacher.token_bytes,
        show=shown,
    )
    if arguments.plots is not None:
        from megabyte_distill.evaluation.boundary_picture import plot_boundaries
        from megabyte_distill.evaluation.comparison_plots import plot_sets
        from megabyte_distill.evaluation.marked_text import mark_sentence

        pictures = [plot_folder(arguments, root) / name for name in ("sets.png", "boundaries.png")]
        plot_sets(found, pictures[0])
        first_row = merge_row(next(iter(rows_of_set.values()))[0], merge_limit)
        marked = mark_sentence(loaded.student, first_row, threshold=arguments.boundary_threshold)
        plot_boundaries(marked, pictures[1])
        say_written(*pictures)
    return found


def open_sets(arguments: argparse.Namespace, table: TokenBytes) -> dict[str, ByteTokenDataset]:
    """The data sets of the command line by name, cut to the held-out share."""
    from megabyte_distill.data.dataset import Part, open_blend

    names = set_names(arguments.data_path)
    blend = open_blend(list(names.values()), tokenizer_hash=table.hash)
    return dict(zip(names, blend.part(Part.VALIDATION, arguments.split).datasets, strict=True))


def plot_folder(arguments: argparse.Namespace, root: Path) -> Path:
    """Where a run's pictures go: a folder of its own where there are several runs."""
    folder: Path = arguments.plots
    return folder if len(arguments.load) == 1 else folder / root.resolve().name


def say_written(*pictures: Path) -> None:
    """Names files on stderr, for stdout has the figures."""
    print(f"written: {', '.join(map(str, pictures))}", file=sys.stderr)


def as_json(arguments: argparse.Namespace, name: str, found: Comparison) -> dict[str, Any]:
    """One run's object: the figures of all text, those of each set, and what has to be said of them."""
    from megabyte_distill.evaluation.report import notes

    missing = [] if arguments.train_data_path else ["unigram_bits_per_byte is null: it needs --train-data-path"]
    return {
        "run": name,
        **found.total.as_dict(),
        "sets": {set_name: part.as_dict() for set_name, part in found.sets.items()},
        "boundary_threshold": arguments.boundary_threshold,
        "thresholds": [asdict(one) for one in found.thresholds],
        "bootstrap": asdict(bootstrap_of(arguments)),
        "notes": notes(found) + missing,
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_tool(build_parser(), run, argv, check=check)


if __name__ == "__main__":
    sys.exit(main())
