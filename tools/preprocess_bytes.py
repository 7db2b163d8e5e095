"""Turns text into a data set of bytes and teacher tokens, and looks after such data sets.

    python tools/preprocess_bytes.py --input corpus.jsonl --output-prefix data/corpus --tokenizer-model TEACHER_DIR
    python tools/preprocess_bytes.py merge --output-prefix data/corpus       # partitions made on several machines
    python tools/preprocess_bytes.py verify data/corpus                      # everything against everything
    python tools/preprocess_bytes.py inspect data/corpus --document 7        # a document with its boundaries

The first writes data/corpus_text_document.{bin,idx,json,token_bytes.npz} and data/corpus_text_tokens.{bin,idx};
training takes ``--data-path data/corpus_text_document``. Dialogues (--chat-template) have a loss mask beside them,
PREFIX_messages_loss_mask.{bin,idx}. See docs/preprocess.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from megabyte_distill.config import ranges
from megabyte_distill.data.chat_template import load_template
from megabyte_distill.data.dataset import ByteTokenDataset
from megabyte_distill.data.dialogues import MESSAGES_KEY
from megabyte_distill.data.encoding import EncodeJob
from megabyte_distill.data.inputs import InputFormat, TextDocuments
from megabyte_distill.data.inspect_document import show_document
from megabyte_distill.data.merge import merge_partitions
from megabyte_distill.data.preprocess import PreprocessOptions, preprocess
from megabyte_distill.data.progress import ProgressBar, shown
from megabyte_distill.data.records import OnInvalid
from megabyte_distill.data.tokenizers import TokenizerKind
from megabyte_distill.data.verify import find_stems, verify_dataset
from megabyte_distill.tool import ToolParser, choice, in_range, run_tool


def _preprocess_parser() -> ToolParser:
    parser = ToolParser(description=__doc__)
    text = parser.add_argument_group("input")
    text.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="FILE",
        help="files, globs, directories, or - for standard input: .jsonl, .json (an array, or an object a line), .txt, "
        "each plain, .gz, .zst, .bz2 or .xz; .parquet",
    )
    text.add_argument(
        "--json-keys", nargs="+", metavar="KEY", help="keys to read, one data set each (text; of dialogues messages)"
    )
    text.add_argument("--chat-template", metavar="chatml|teacher|FILE", help="records are dialogues, messages of role "
                      "and content or prompt and completion: write them by the built-in template, by that of the "
                      "teacher's tokenizer_config.json, or by a Jinja file, and mark the answers (records are plain "
                      "text)")  # fmt: skip
    text.add_argument("--input-format", **choice(*InputFormat, of=InputFormat), default=InputFormat.AUTO,
                      help="format whatever the endings say (auto; standard input is jsonl)")  # fmt: skip
    text.add_argument("--text-documents", **choice(*TextDocuments, of=TextDocuments), default=TextDocuments.FILE,
                      help="what a .txt file is: one document, or one a line (file)")  # fmt: skip
    text.add_argument("--on-invalid", **choice(*OnInvalid, of=OnInvalid), default=OnInvalid.ERROR,
                      help="records that cannot be read: stop, leave them out, or put U+FFFD where bytes are no UTF-8 "
                      "and leave out the rest (error)")  # fmt: skip
    text.add_argument("--strict", action="store_true", help="stop at a document that its tokens do not rebuild, "
                      "instead of leaving it out")  # fmt: skip
    _tokenizer_flags(parser)
    output = parser.add_argument_group("output")
    output.add_argument(
        "--output-prefix",
        required=True,
        metavar="PREFIX",
        help="files are PREFIX_KEY_document.* and PREFIX_KEY_tokens.*",
    )
    output.add_argument("--overwrite", action="store_true", help="replace a data set of the same name")
    output.add_argument("--log-interval", type=in_range(ranges.COUNT), default=1000, metavar="DOCUMENTS",
                        help="documents between progress lines where there is no terminal (1000)")  # fmt: skip
    work = parser.add_argument_group("work")
    work.add_argument("--workers", type=in_range(ranges.COUNT), default=1, metavar="N",
                      help="processes that tokenize, or threads that parse without tokenizer (1)")  # fmt: skip
    work.add_argument("--partitions", type=in_range(ranges.COUNT), default=1, metavar="N",
                      help="cut the input files into this many runs, each complete or absent, merged at the end "
                      "(1)")  # fmt: skip
    work.add_argument("--partition-index", type=in_range(ranges.SIZE), metavar="I",
                      help="write this partition alone, from 0; merge them later (default: all, merged)")  # fmt: skip
    work.add_argument("--resume", action="store_true", help="go on after an interruption: finished partitions stay")
    return parser


def _tokenizer_flags(parser: ToolParser) -> None:
    tokenizer = parser.add_argument_group("tokenizer")
    tokenizer.add_argument("--tokenizer-model", default="", metavar="PATH", help="the teacher's folder, or its "
                           "tokenizer file (none, for --tokenizer-type none)")  # fmt: skip
    tokenizer.add_argument("--tokenizer-type", **choice(*TokenizerKind, of=TokenizerKind),
                           default=TokenizerKind.AUTO, help="format of the tokenizer; none stores bytes alone (auto: "
                           "by its files)")  # fmt: skip
    tokenizer.add_argument(
        "--tiktoken-pattern",
        metavar="REGEX",
        help="split pattern of a tiktoken rank file (Llama 3's and Qwen's are known)",
    )
    tokenizer.add_argument(
        "--end-of-text", metavar="TOKEN", help="text or id of the token that ends a document (by the tokenizer's files)"
    )
    tokenizer.add_argument("--bos", metavar="TOKEN",
                           help="text or id of the token before a document (by the tokenizer's files)")  # fmt: skip
    tokenizer.add_argument("--append-eod", action="store_true", help="end each token item with the end-of-text id, as "
                           "Megatron-LM's own training wants it; ours knows where a document ends")  # fmt: skip


def run(options: argparse.Namespace) -> None:
    """Preprocess and print the summary."""
    name = options.chat_template
    template = None if name is None else load_template(name, options.tokenizer_model)
    summary = preprocess(
        options.input,
        output_prefix=options.output_prefix,
        job=EncodeJob(
            json_keys=tuple(options.json_keys or ["text" if options.chat_template is None else MESSAGES_KEY]),
            chat_template=template,
            tokenizer_model=options.tokenizer_model,
            tokenizer_kind=options.tokenizer_type,
            tiktoken_pattern=options.tiktoken_pattern,
            end_of_text=options.end_of_text,
            bos=options.bos,
            append_eod=options.append_eod,
            on_invalid=options.on_invalid,
            strict=options.strict,
        ),
        options=PreprocessOptions(
            input_format=options.input_format,
            text_documents=options.text_documents,
            workers=options.workers,
            partitions=options.partitions,
            partition_index=options.partition_index,
            resume=options.resume,
            overwrite=options.overwrite,
            log_interval=options.log_interval,
            report=_say,
            progress=ProgressBar if sys.stderr.isatty() else None,
        ),
    )
    print(summary)


def _merge_parser() -> ToolParser:
    parser = ToolParser(description="Joins the partitions of one run, wherever they were made, into one data set.")
    parser.prog += " merge"
    partitions = parser.add_argument_group("input")
    partitions.add_argument(
        "--output-prefix", required=True, metavar="PREFIX", help="as it was given for the partitions"
    )
    partitions.add_argument("--json-keys", nargs="+", default=["text"], metavar="KEY",
                            help="keys that were read; of dialogues messages or what was given (text)")  # fmt: skip
    output = parser.add_argument_group("output")
    output.add_argument("--overwrite", action="store_true", help="replace a data set of the same name")
    output.add_argument("--keep-partitions", action="store_true", help="do not remove them at the end")
    return parser


def merge(options: argparse.Namespace) -> None:
    """Merge and print the stems."""
    merged = merge_partitions(
        options.output_prefix, options.json_keys, overwrite=options.overwrite, keep=options.keep_partitions
    )
    for paths in merged:
        print(f"--data-path {paths.stem}")


def _verify_parser() -> ToolParser:
    parser = ToolParser(
        description="Checks a data set: index against data, tokens against bytes, BOS, UTF-8, manifest."
    )
    parser.prog += " verify"
    parser.add_argument("output", nargs="+", help="the --output-prefix, or a stem PREFIX_KEY_document")
    return parser


def verify(options: argparse.Namespace) -> None:
    """Verify and print a line a data set."""
    for output in options.output:
        for stem in find_stems(output):
            manifest = verify_dataset(stem, show=shown)
            print(f"{stem}: {manifest.documents} documents, {manifest.bytes} bytes, {manifest.tokens} tokens: correct")


def _inspect_parser() -> ToolParser:
    parser = ToolParser(description="Prints a document with a mark behind each byte that ends a token.")
    parser.prog += " inspect"
    parser.add_argument("output", help="the --output-prefix, or a stem PREFIX_KEY_document")
    extent = parser.add_argument_group("what is shown")
    extent.add_argument("--document", type=in_range(ranges.SIZE), default=0, metavar="I", help="which one, from 0 (0)")
    extent.add_argument(
        "--limit", type=in_range(ranges.COUNT), default=4000, metavar="BYTES", help="bytes to show at most (4000)"
    )
    return parser


def inspect(options: argparse.Namespace) -> None:
    """Print the document of each key."""
    for stem in find_stems(options.output):
        print(show_document(ByteTokenDataset(stem), options.document, limit=options.limit))


_COMMANDS = {
    "": (_preprocess_parser, run),
    "merge": (_merge_parser, merge),
    "verify": (_verify_parser, verify),
    "inspect": (_inspect_parser, inspect),
}


def build_parser(command: str = "") -> ToolParser:
    """The command line, or that of merge, verify or inspect."""
    return _COMMANDS[command][0]()


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    command = words.pop(0) if words and words[0] in _COMMANDS.keys() - {""} else ""
    return run_tool(build_parser(command), _COMMANDS[command][1], words)


if __name__ == "__main__":
    sys.exit(main())
