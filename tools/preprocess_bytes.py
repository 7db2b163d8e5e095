"""Turns text into a data set of bytes and teacher tokens.

    python tools/preprocess_bytes.py --input corpus.jsonl --output-prefix data/corpus --tokenizer-model TEACHER_DIR

writes data/corpus_text_document.{bin,idx,json,token_bytes.npz} and data/corpus_text_tokens.{bin,idx}; training takes
``--data-path data/corpus_text_document``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from megabyte_distill.data.preprocess import preprocess
from megabyte_distill.data.tokenizers import TokenizerKind
from megabyte_distill.tool import run_tool


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="FILE",
        help="files or globs: .jsonl (an object a line), .txt (a document a file), plain, .gz or .xz",
    )
    parser.add_argument("--json-keys", nargs="+", default=["text"], help="keys to read, one data set each (text)")
    parser.add_argument(
        "--output-prefix", required=True, help="files are PREFIX_KEY_document.* and PREFIX_KEY_tokens.*"
    )
    parser.add_argument("--tokenizer-model", required=True, help="the teacher's folder, or its tokenizer file")
    parser.add_argument(
        "--tokenizer-type",
        type=TokenizerKind,
        choices=list(TokenizerKind),
        default=TokenizerKind.AUTO,
        metavar="{" + ",".join(TokenizerKind) + "}",
        help="format of the tokenizer (auto: by its files)",
    )
    parser.add_argument("--tiktoken-pattern", help="split pattern of a tiktoken rank file (Llama 3's is known)")
    parser.add_argument("--end-of-text", help="text of the token that ends a document (by the tokenizer's files)")
    parser.add_argument("--bos", help="text of the token that starts a document (by the tokenizer's files)")
    parser.add_argument("--workers", type=int, default=1, help="processes that tokenize (1)")
    parser.add_argument("--log-interval", type=int, default=1000, help="documents between progress lines (1000)")
    parser.add_argument("--overwrite", action="store_true", help="replace a data set of the same name")
    return parser


def run(options: argparse.Namespace) -> None:
    """Preprocess and print the summary."""
    summary = preprocess(
        options.input,
        output_prefix=options.output_prefix,
        tokenizer_model=options.tokenizer_model,
        tokenizer_kind=options.tokenizer_type,
        tiktoken_pattern=options.tiktoken_pattern,
        end_of_text=options.end_of_text,
        bos=options.bos,
        json_keys=options.json_keys,
        workers=options.workers,
        log_interval=options.log_interval,
        overwrite=options.overwrite,
        report=lambda line: print(line, file=sys.stderr, flush=True),
    )
    print(summary)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_tool(_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
