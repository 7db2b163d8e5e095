"""Checks the exact byte targets against brute force, for every prefix and every token of real vocabularies.

    python scripts/check_exact_targets.py --tokenizer DIR_OR_FILE ...
    python scripts/check_exact_targets.py --load CKPT --data-path STEM

The first form draws next-token distributions from flat to peaked, and one with nearly all mass on one token; the second
takes those of a converted teacher on text. A line a distribution, and one JSON object as the last line.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megabyte_distill.config import ranges
from megabyte_distill.data import tokenizers
from megabyte_distill.data.token_bytes import TokenBytes
from megabyte_distill.objectives.target_check import EveryToken, TargetErrors
from megabyte_distill.tool import Failure, ToolParser, in_range, run_tool


def build_parser() -> ToolParser:
    """The command line."""
    parser = ToolParser(description=__doc__, failure="targets are not exact")
    vocabularies = parser.add_argument_group("drawn distributions").add_argument
    vocabularies("--tokenizer", nargs="+", default=[], metavar="DIR_OR_FILE", help="teachers' tokenizers (none)")
    teachers = parser.add_argument_group("a teacher's distributions").add_argument
    teachers("--load", type=Path, metavar="CKPT", help="a converted teacher (none)")
    teachers("--data-path", metavar="STEM", help="its text, PREFIX_KEY_document (none)")
    teachers("--positions", type=in_range(ranges.COUNT), default=20, metavar="TOKENS",
             help="of the text, evenly spread (20)")  # fmt: skip
    return parser


def drawn(table: TokenBytes) -> Iterator[tuple[str, Tensor]]:
    """(name, logits [W]) of random distributions."""
    noise = torch.randn(table.vocab_size, generator=torch.Generator().manual_seed(0))
    for scale in (1.0, 3.0, 6.0, 10.0):
        yield f"scale {scale:g}", scale * noise
    one = noise.clone()
    one[int(torch.from_numpy(table.lengths).argmax())] = 25.0
    yield "one token", one


def of_teacher(load: Path, stem: str, positions: int) -> tuple[TokenBytes, list[tuple[str, Tensor]]]:
    """The teacher's vocabulary and its distributions on the first row of the text."""
    from megabyte_distill.conversion.teacher_folder import load_teacher
    from megabyte_distill.data.dataset import ByteTokenDataset
    from megabyte_distill.data.sampler import evaluation_rows
    from megabyte_distill.parallel.process_groups import world

    with world(), torch.no_grad():
        teacher = load_teacher(load, dtype=torch.float32)
        source = ByteTokenDataset(stem, tokenizer_hash=teacher.token_bytes.hash)
        row = next(iter(evaluation_rows(source, row_bytes=4096, chunk_bucket=1))).to(teacher.backbone.device)
        hidden = teacher.backbone(teacher.backbone.embed(row.tokens), row.cu_chunks)
        chosen = torch.linspace(0, int(row.token_mask.sum()) - 1, positions).long().unique()
        logits = teacher.backbone.logits(hidden[chosen]).float().cpu()
        return teacher.token_bytes, [(f"token {at}", one) for at, one in zip(chosen.tolist(), logits, strict=True)]


def check(name: str, table: TokenBytes, distributions: Sequence[tuple[str, Tensor]]) -> list[TargetErrors]:
    """A line each."""
    every = EveryToken(table)
    found = []
    for title, logits in distributions:
        errors = every.errors(logits)
        print(
            f"{name}, {title}: {errors.tokens:,} tokens, sums {errors.sums:.1e}, relative error of products "
            f"{errors.likely_products:.1e}, {'exact' if errors.is_exact else 'NOT EXACT'}",
            flush=True,
        )
        found.append(errors)
    return found


def flags_problems(options: argparse.Namespace) -> Iterator[str]:
    """What is wrong with the flags together."""
    if not (options.tokenizer or options.load or options.data_path):
        yield "--tokenizer: missing, and so is --load with --data-path; give one of the two"
    elif options.load and not options.data_path:
        yield "--data-path: missing; it names the text of the teacher --load"
    elif options.data_path and not options.load:
        yield "--load: missing; --data-path is its text, which --tokenizer does not read"


def run(options: argparse.Namespace) -> None:
    """Checks all that is asked for; Failure where targets are not exact."""
    found: dict[str, list[TargetErrors]] = {}
    for path in options.tokenizer:
        table = tokenizers.load(path).token_bytes
        found[path] = check(path, table, list(drawn(table)))
    if options.load:
        table, distributions = of_teacher(options.load, options.data_path, options.positions)
        found[str(options.load)] = check(str(options.load), table, distributions)
    print(json.dumps({name: [dataclasses.asdict(errors) for errors in each] for name, each in found.items()}))
    if wrong := [name for name, each in found.items() if not all(errors.is_exact for errors in each)]:
        raise Failure(f"the targets of {', '.join(wrong)} are not exact; the lines above say by how much")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_tool(build_parser(), run, argv, check=flags_problems)


if __name__ == "__main__":
    sys.exit(main())
