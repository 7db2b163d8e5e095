"""Compares a run's student with its teacher on held-out text.

    python tools/evaluate.py --load RUN --data-path data/heldout_text_document --json

Bits per byte of both, retention, boundaries, and anchors. Exit code 0, or 2 with one line that begins with "error:".
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megabyte_distill.tool import run_tool

if TYPE_CHECKING:
    from megabyte_distill.evaluation.bits_per_byte import Evaluation


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--load", type=Path, required=True, metavar="RUN", help="folder of a training run")
    add("--stage", help="stage whose weights are taken (default: the last complete one)")
    add("--data-path", nargs="+", required=True, metavar="STEM", help="held-out data sets, PREFIX_KEY_document")
    add("--split", metavar="T,V,S", help="score only the validation share V of each set, as held out by training")
    add("--train-data-path", nargs="+", metavar="STEM", help="training data, for the token unigram anchor")
    add("--teacher", type=Path, metavar="CKPT", help="the teacher's checkpoint, where it moved")
    add("--seq-length", type=int, default=2048, help="bytes of a row: the context of all figures (2048)")
    add("--max-bytes", type=int, metavar="N", help="text at most, whole rows (default: all)")
    add("--max-documents", type=int, metavar="N", help="documents at most of each data set (default: all)")
    add("--paths", type=int, default=4, help="bit histories of the figure without a tokenizer; 0 leaves it out (4)")
    add("--path-bytes", type=int, default=20_000, metavar="N", help="text of that figure, evenly spread (20000)")
    add("--json", action="store_true", help="print one JSON object")
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Evaluates and prints; ValueError for what the user can mend."""
    if arguments.seq_length < 2 or arguments.paths < 0 or arguments.path_bytes < 1:
        raise ValueError(
            f"--seq-length {arguments.seq_length}, --paths {arguments.paths}, --path-bytes {arguments.path_bytes}: "
            "expected at least 2, 0 and 1"
        )
    # megatron takes seconds to import, which --help should not
    from megabyte_distill.parallel.process_groups import world

    with world():
        result = evaluate(arguments)
    print(json.dumps(result.as_dict(), indent=2) if arguments.json else table(result))


def evaluate(arguments: argparse.Namespace) -> Evaluation:
    """Loads everything and evaluates; needs process groups."""
    from megabyte_distill.config.blend import parse_split
    from megabyte_distill.data.dataset import open_blend, split_documents
    from megabyte_distill.evaluation.anchors import token_counts, unigram_nll
    from megabyte_distill.evaluation.bits_per_byte import evaluate_run
    from megabyte_distill.evaluation.held_out import held_out_rows
    from megabyte_distill.runs import load_run_teacher, load_students, require_speaking

    students = load_students(arguments.load, arguments.stage)
    loaded = students.last
    require_speaking(loaded)
    teacher = load_run_teacher(arguments.load, arguments.teacher)
    table_hash = loaded.token_bytes.hash
    datasets, _ = open_blend(arguments.data_path, tokenizer_hash=table_hash)
    if arguments.split:
        shares = parse_split(arguments.split)
        datasets = [dataset.subset(split_documents(len(dataset), shares)[1]) for dataset in datasets]
    unigram = None
    if arguments.train_data_path:
        training, _ = open_blend(arguments.train_data_path, tokenizer_hash=table_hash)
        unigram = unigram_nll(token_counts(training), loaded.token_bytes)
    rows = held_out_rows(
        datasets,
        row_bytes=arguments.seq_length,
        max_bytes=arguments.max_bytes,
        max_documents=arguments.max_documents,
    )
    return evaluate_run(
        loaded.student,
        teacher.backbone,
        rows,
        stage1_student=students.distilled,
        aligned_student=students.aligned,
        unigram=unigram,
        paths=arguments.paths,
        path_bytes=arguments.path_bytes,
    )


def table(result: Evaluation) -> str:
    """What a person reads."""
    lines = [
        f"{result.text_bytes:,} bytes of {result.documents} documents; bits per byte, document ends left out",
        f"  teacher, its tokens               {result.teacher_bits_per_byte:7.4f}",
        f"  student, gold bits                {result.student_bits_per_byte:7.4f}   "
        f"retention {result.retention:.4f}, gap {result.gap_bits_per_byte:+.4f}",
        f"  student, router's bits            {result.router_bits_per_byte:7.4f}",
        f"  student, stage 1's token head     {result.stage1_bits_per_byte:7.4f}   "
        f"retention {result.stage1_retention:.4f}",
        f"  anchor, teacher reading nothing   {result.constant_embedding_bits_per_byte:7.4f}",
    ]
    if result.unigram_bits_per_byte is not None:
        lines.append(f"  anchor, token unigram             {result.unigram_bits_per_byte:7.4f}")
    if result.paths is not None:
        paths = result.paths
        lines += [
            f"without a tokenizer, {paths.text_bytes:,} bytes",
            f"  student, {paths.paths:3d} paths                {paths.bits_per_byte:7.4f}",
            f"  student, causal byte filter       {paths.filter_bits_per_byte:7.4f}",
            f"  student, gold bits, same text     {paths.gold_bits_per_byte:7.4f}",
            f"  teacher, same text                {paths.teacher_bits_per_byte:7.4f}",
        ]
    lines += [
        f"boundaries: precision {result.boundary_precision:.4f}, recall {result.boundary_recall:.4f}, "
        f"F1 {result.boundary_f1:.4f}; bytes per chunk {result.bytes_per_chunk:.2f} gold, "
        f"{result.router_bytes_per_chunk:.2f} router",
        f"alignment: MSE over the table's variance {result.alignment_mse_relative:.4f}",
    ]
    ends = (result.teacher_bits_per_document_end, result.student_bits_per_document_end)
    if ends[0] is not None and ends[1] is not None:
        lines.append(f"document ends: {ends[0]:.2f} bits each for the teacher, {ends[1]:.2f} for the student")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_tool(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
