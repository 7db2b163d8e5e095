"""Checks tokenizers on a corpus: every document rebuilt, and the fast encoder's ids against the plain library's.

    python scripts/check_real_tokenizers.py --tokenizer DIR_OR_FILE ... --input corpus.jsonl ...

A progress line every few seconds on standard error, a line a tokenizer, and one JSON object as the last line.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Sequence

from megabyte_distill.config import ranges
from megabyte_distill.data import tokenizers
from megabyte_distill.data.preprocess import iterate_texts
from megabyte_distill.data.tokenizer_check import TokenizerCheck
from megabyte_distill.tool import Failure, ToolParser, in_range, run_tool

_BATCH = 64
_SECONDS_BETWEEN_LINES = 10


def build_parser() -> ToolParser:
    """The command line."""
    parser = ToolParser(description=__doc__, failure="a document is not rebuilt, or has other ids")
    add = parser.add_argument_group("input").add_argument
    add("--tokenizer", nargs="+", required=True, metavar="DIR_OR_FILE", help="teachers' tokenizers")
    add("--input", nargs="+", required=True, metavar="FILE", help="text, as tools/preprocess_bytes.py takes it")
    add("--json-key", default="text", metavar="KEY", help="key of the text (text)")
    add("--max-bytes", type=in_range(ranges.COUNT), metavar="BYTES", help="text of each input file at most (all)")
    return parser


def check(path: str, options: argparse.Namespace) -> dict[str, object]:
    """One tokenizer on all text."""
    start = time.perf_counter()
    tokenizer = tokenizers.load(path)
    loaded = time.perf_counter() - start
    print(f"{path}: {tokenizer.encoder}", file=sys.stderr, flush=True)
    counts = TokenizerCheck()
    last = time.monotonic()
    for source in options.input:
        limit = None if options.max_bytes is None else counts.bytes + options.max_bytes
        texts = iter(iterate_texts([source], options.json_key))
        while batch := list(itertools.islice(texts, _BATCH)):
            counts.add(tokenizer, batch)
            if time.monotonic() - last > _SECONDS_BETWEEN_LINES:
                last = time.monotonic()
                print(
                    f"{source}: {counts.documents} documents, {counts.bytes / 1e6:.1f} MB", file=sys.stderr, flush=True
                )
            if limit is not None and counts.bytes >= limit:
                break
    result = {"tokenizer": path, "encoder": tokenizer.encoder, "load_seconds": loaded, **dataclasses.asdict(counts)}
    print(" ".join(f"{name}={value}" for name, value in result.items() if name != "encoder"), flush=True)
    return result


def run(options: argparse.Namespace) -> None:
    """Checks every tokenizer; Failure where a document differs."""
    results = [check(path, options) for path in options.tokenizer]
    print(json.dumps({"tokenizers": results}))
    if wrong := [str(result["tokenizer"]) for result in results if result["not_rebuilt"] or result["different_ids"]]:
        raise Failure(f"documents differ with {', '.join(wrong)}; the lines above say how many")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_tool(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
