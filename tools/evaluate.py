"""Compares a run's student with its teacher on held-out text.

    python tools/evaluate.py --load RUN --data-path data/heldout_text_document --json
    python tools/evaluate.py --load RUN OTHER --data-path en=data/en_text_document de=data/de_text_document --plots DIR
    python tools/evaluate.py --load RUN --data-path data/heldout_text_document --suite robustness

Bits per byte of both, retention, boundaries, next bytes, and anchors, with confidence intervals over documents; or what
noise, cut prompts, tasks on characters and other scripts do to both. Exit code 0, or 2 with one line that begins with
"error:".
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megabyte_distill.tool import run_tool

if TYPE_CHECKING:
    from megabyte_distill.data.dataset import ByteTokenDataset
    from megabyte_distill.data.token_bytes import TokenBytes
    from megabyte_distill.evaluation.bits_per_byte import Comparison, Measures
    from megabyte_distill.evaluation.bootstrap import Bootstrap
    from megabyte_distill.evaluation.robustness import Budget, Section

SUITES = ("heldout", "robustness")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--load", type=Path, nargs="+", required=True, metavar="RUN", help="training runs; several stand side by side")
    add("--stage", help="stage whose weights are taken (default: the last complete one)")
    add("--data-path", nargs="+", required=True, metavar="[NAME=]STEM",
        help="held-out data sets, PREFIX_KEY_document; each is a row of the table")  # fmt: skip
    add("--split", metavar="T,V,S", help="score only the validation share V of each set, as held out by training")
    add("--teacher", type=Path, metavar="CKPT", help="the teacher's checkpoint, where it moved")
    add("--max-documents", type=int, metavar="N", help="documents at most of each data set (default: all)")
    add("--suite", choices=SUITES, default="heldout", help="what is measured (heldout)")
    add("--paths", type=int, default=4, help="bit histories of figures without a tokenizer; 0 leaves them out (4)")
    add("--resamples", type=int, default=1000, help="draws for confidence intervals; 0 makes none (1000)")
    add("--confidence", type=float, default=0.95, help="share of draws inside an interval (0.95)")
    add("--seed", type=int, default=0, help="of all that is drawn (0)")
    add("--json", action="store_true", help="print one JSON object")
    add("--plots", type=Path, metavar="DIR", help="draw PNG pictures into this folder")
    _add_held_out(parser.add_argument_group("--suite heldout").add_argument)
    _add_robustness(parser.add_argument_group("--suite robustness").add_argument)
    return parser


def _add_held_out(add: Any) -> None:
    add("--train-data-path", nargs="+", metavar="STEM", help="training data, for the token unigram anchor")
    add("--seq-length", type=int, default=2048, help="bytes of a row: the context of all figures (2048)")
    add("--max-bytes", type=int, metavar="N", help="text at most, whole rows, shared evenly by the sets (default: all)")
    add("--bits", choices=("gold", "router", "merged"),
        help="bits of the headline figures, as input and label (what it was taught: gold or merged)")  # fmt: skip
    add("--boundary-threshold", type=float, default=0.5, metavar="T",
        help="the router ends a chunk where its p is above this, in all figures under its bits (0.5)")  # fmt: skip
    add("--boundary-thresholds", metavar="T,T,...",
        help="a table of quality and backbone steps per byte along these thresholds, as 0.3,0.5,0.7")  # fmt: skip
    add("--scoring", choices=("joint", "official"), default="joint",
        help="official adds the paper's score, which is no bound (joint)")  # fmt: skip
    add("--tokenizations", type=int, default=0, metavar="K",
        help="with --paths, the teacher summed over K tokenizations of the same text (0: left out)")  # fmt: skip
    add("--path-bytes", type=int, default=20_000, metavar="N", help="text of the figure by --paths, spread (20000)")


def _add_robustness(add: Any) -> None:
    add("--suite-texts", type=int, default=12, metavar="N", help="pieces of text that are noised and cut (12)")
    add("--suite-questions", type=int, default=24, metavar="N", help="questions of each task on characters (24)")
    add("--suite-samples", type=int, default=4, metavar="N", help="samples of each of ten scripts (4)")


def run(arguments: argparse.Namespace) -> None:
    """Evaluates and prints; ValueError for what the user can mend."""
    for name, least in (("seq_length", 2), ("paths", 0), ("tokenizations", 0), ("path_bytes", 1)):
        value = getattr(arguments, name)
        if value < least:
            raise ValueError(f"--{name.replace('_', '-')} {value}: expected at least {least}")
    if not 0 < arguments.boundary_threshold < 1:
        raise ValueError(f"--boundary-threshold {arguments.boundary_threshold}: expected a number between 0 and 1")
    # megatron takes seconds to import, which --help should not
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
    from megabyte_distill.runs import load_run_teacher, load_student, require_speaking

    bootstrap, limit = bootstrap_of(arguments), arguments.max_documents
    if arguments.paths < 1 or (limit is not None and limit < 1):
        raise ValueError(
            f"--paths {arguments.paths}, --max-documents {limit}: --suite robustness reads documents along paths; give "
            "at least 1 of both"
        )
    loaded = load_student(root, arguments.stage)
    require_speaking(loaded)
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
    )
    if arguments.plots is not None:
        from megabyte_distill.evaluation.comparison_plots import plot_robustness

        plot_robustness(sections, plot_folder(arguments, root) / "robustness.png")
    return sections


def bootstrap_of(arguments: argparse.Namespace) -> Bootstrap:
    """How intervals are made; ValueError for settings out of range."""
    from megabyte_distill.evaluation.bootstrap import Bootstrap

    return Bootstrap(resamples=arguments.resamples, confidence=arguments.confidence, seed=arguments.seed)


def measures_of(arguments: argparse.Namespace, merge_limit: float | None) -> Measures:
    """What is to be measured of a student whose stage merged tokens so; ValueError for settings out of range."""
    from megabyte_distill.evaluation.bits_per_byte import Measures, headline_bits
    from megabyte_distill.evaluation.document_counts import Bits
    from megabyte_distill.evaluation.thresholds import parse_thresholds

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
        thresholds=parse_thresholds(arguments.boundary_thresholds or ""),
        bootstrap=bootstrap_of(arguments),
    )


def compare(arguments: argparse.Namespace, root: Path) -> Comparison:
    """Loads a run and compares its student with its teacher; needs process groups."""
    from megabyte_distill.data.chunk_merging import merge_row
    from megabyte_distill.data.dataset import open_blend
    from megabyte_distill.evaluation import bits_per_byte
    from megabyte_distill.evaluation.anchors import token_counts, unigram_nll
    from megabyte_distill.evaluation.held_out import held_out_rows
    from megabyte_distill.runs import chunk_limit, load_run_teacher, load_students, require_speaking

    students = load_students(root, arguments.stage)
    loaded = students.last
    require_speaking(loaded)
    merge_limit = chunk_limit(loaded.checkpoint)
    measures = measures_of(arguments, merge_limit)
    teacher = load_run_teacher(root, arguments.teacher)
    sets = open_sets(arguments, loaded.token_bytes)
    unigram = None
    if arguments.train_data_path:
        training, _ = open_blend(arguments.train_data_path, tokenizer_hash=loaded.token_bytes.hash)
        unigram = unigram_nll(token_counts(training), loaded.token_bytes)
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
    )
    if arguments.plots is not None:
        from megabyte_distill.evaluation.comparison_plots import plot_sets
        from megabyte_distill.evaluation.marked_text import mark_sentence
        from megabyte_distill.evaluation.plots import plot_boundaries

        folder = plot_folder(arguments, root)
        plot_sets(found, folder / "sets.png")
        shown = merge_row(next(iter(rows_of_set.values()))[0], merge_limit)
        marked = mark_sentence(loaded.student, shown, threshold=arguments.boundary_threshold)
        plot_boundaries(marked, folder / "boundaries.png")
    return found


def open_sets(arguments: argparse.Namespace, table: TokenBytes) -> dict[str, ByteTokenDataset]:
    """The data sets of the command line by name, cut to the held-out share."""
    from megabyte_distill.config.blend import parse_split
    from megabyte_distill.data.dataset import open_blend, split_documents
    from megabyte_distill.evaluation.held_out import set_names

    names = set_names(arguments.data_path)
    datasets, _ = open_blend(list(names.values()), tokenizer_hash=table.hash)
    if arguments.split:
        shares = parse_split(arguments.split)
        datasets = [dataset.subset(split_documents(len(dataset), shares)[1]) for dataset in datasets]
    return dict(zip(names, datasets, strict=True))


def plot_folder(arguments: argparse.Namespace, root: Path) -> Path:
    """Where a run's pictures go: a folder of its own where there are several runs."""
    folder: Path = arguments.plots
    return folder if len(arguments.load) == 1 else folder / root.resolve().name


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
    return run_tool(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
