"""Hugging Face in and out.

convert_checkpoint.py import    --hf-model DIR --megatron-path CKPT
convert_checkpoint.py export    --megatron-path RUN[/2b] --hf-path DIR
convert_checkpoint.py export    --teacher --megatron-path CKPT --hf-path DIR
convert_checkpoint.py compare   --hf-model DIR --megatron-path CKPT
convert_checkpoint.py roundtrip --hf-model DIR
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megabyte_distill.config import ranges
from megabyte_distill.conversion.hf_config import HfConfig
from megabyte_distill.conversion.model_config import MODEL_CONFIG_FILE
from megabyte_distill.conversion.new_folder import EXPORT_MARKER, check_replaceable
from megabyte_distill.data.progress import shown
from megabyte_distill.run_folder import require_run, split_stage
from megabyte_distill.tool import (
    ToolParser,
    choice,
    file_to_read,
    folder_to_read,
    in_range,
    judged,
    problems_of,
    run_tool,
)

if TYPE_CHECKING:
    import torch

_TRAINED_DTYPES = ("float32", "bfloat16")
_EXPORTED_DTYPES = (*_TRAINED_DTYPES, "float16")


def build_parser() -> ToolParser:
    """The command line."""
    parser = ToolParser(description=__doc__)
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="{import,export,compare,roundtrip}", title="commands"
    )

    def command(name: str, text: str) -> ToolParser:
        return commands.add_parser(name, help=text, description=text)

    _import_flags(command("import", "Hugging Face folder to teacher checkpoint"))
    _export_flags(command("export", "student or teacher to Hugging Face folder"))
    _compare_flags(command("compare", "largest logit difference against transformers"))
    text = "import, export and compare every tensor's bits, in the temporary folder (TMPDIR: room for the model twice)"
    _reads(command("roundtrip", text), hf_model=True)
    return parser


def _reads(parser: ToolParser, *, hf_model: bool = False, megatron_path: bool = False) -> None:
    group = parser.add_argument_group("input")
    if hf_model:
        group.add_argument("--hf-model", type=Path, required=True, metavar="DIR", help="Hugging Face model folder")
    if megatron_path:
        group.add_argument("--megatron-path", type=Path, required=True, metavar="CKPT", help="checkpoint folder")


def _writes(parser: ToolParser, flag: str, metavar: str, what: str, dtypes: Sequence[str]) -> None:
    group = parser.add_argument_group("output")
    group.add_argument(flag, type=Path, required=True, metavar=metavar, help=f"{what} folder to write")
    group.add_argument("--torch-dtype", **choice(*dtypes), help="dtype of the weights (default: as stored)")
    group.add_argument("--overwrite", action="store_true", help="replace an earlier output")


def _import_flags(parser: ToolParser) -> None:
    _reads(parser, hf_model=True)
    _writes(parser, "--megatron-path", "CKPT", "checkpoint", _TRAINED_DTYPES)
    sizes = parser.add_argument_group("sizes to check")
    for name, metavar, what in (("--tp", "T", "tensor"), ("--pp", "P", "pipeline")):
        text = (
            f"check that the model can be cut into {what}-parallel size {metavar} (1; the checkpoint loads at any size)"
        )
        sizes.add_argument(name, type=in_range(ranges.COUNT), default=1, metavar=metavar, help=text)


def _export_flags(parser: ToolParser) -> None:
    _reads(parser, megatron_path=True)
    _writes(parser, "--hf-path", "DIR", "Hugging Face", _EXPORTED_DTYPES)
    model = parser.add_argument_group("model")
    model.add_argument("--teacher", action="store_true", help="write the backbone alone, as a token model")
    model.add_argument(
        "--paths", type=in_range(ranges.COUNT), metavar="K", help="bit histories of the exported byte model (4)"
    )
    model.add_argument(
        "--boundary-threshold",
        type=in_range(ranges.BOUNDARY_THRESHOLD),
        metavar="T",
        help="in generate_bytes of the export a byte ends a chunk where the model gives that more than this "
        "(default: bits are drawn with their bytes)",
    )


def _compare_flags(parser: ToolParser) -> None:
    _reads(parser, hf_model=True, megatron_path=True)
    texts = parser.add_argument_group("text").add_mutually_exclusive_group()
    texts.add_argument("--text", metavar="TEXT", help="text to compare on (default: a short English sentence)")
    texts.add_argument(
        "--text-file", type=judged(file_to_read), metavar="FILE", help="UTF-8 file with that text instead (none)"
    )
    output = parser.add_argument_group("output")
    output.add_argument("--per-position", action="store_true", help="print a line per position")
    output.add_argument("--json", action="store_true", help="print one JSON object, positions included")


def check(arguments: argparse.Namespace) -> Iterable[str]:
    """What is wrong with the flags together, and with the folders that are read."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        yield "conversion runs in one process: start it with python, not torchrun; its result loads anywhere"
    command = arguments.command
    hf_model, stored = getattr(arguments, "hf_model", None), getattr(arguments, "megatron_path", None)
    if hf_model is not None:
        yield from problems_of("--hf-model", lambda: HfConfig.read(hf_model))
    if stored is not None and (command == "compare" or (command == "export" and arguments.teacher)):
        yield from problems_of("--megatron-path", lambda: folder_to_read(stored))
    elif stored is not None and command == "export":
        yield from problems_of("--megatron-path", lambda: require_run(split_stage(stored)[0]))
    if command == "import":
        yield from _not_replaceable(arguments, "--megatron-path", stored, MODEL_CONFIG_FILE)
    elif command == "export":
        yield from _not_replaceable(arguments, "--hf-path", arguments.hf_path, EXPORT_MARKER)
    if command == "export" and arguments.teacher:
        for flag, value in (("--paths", arguments.paths), ("--boundary-threshold", arguments.boundary_threshold)):
            if value is not None:
                yield f"{flag}: belongs to a student's byte model; leave it out, or leave --teacher out"


def _not_replaceable(arguments: argparse.Namespace, flag: str, output: Path | None, marker: str) -> list[str]:
    if output is None:
        return []
    return problems_of(flag, lambda: check_replaceable(output, overwrite=arguments.overwrite, marker=marker))


def run(arguments: argparse.Namespace) -> None:
    """Carries out one command; ValueError for what the user can mend."""
    # megatron takes seconds to import, which --help and a mistyped flag should not
    import torch

    from megabyte_distill.parallel.process_groups import world

    name = getattr(arguments, "torch_dtype", None)
    dtype = None if name is None else getattr(torch, name)
    with world():
        if arguments.command == "import":
            _import(arguments, dtype)
        elif arguments.command == "export":
            _export(arguments, dtype)
        elif arguments.command == "compare":
            _compare(arguments)
        else:
            from megabyte_distill.conversion.compare import roundtrip

            tensors = roundtrip(arguments.hf_model, show=shown)
            print(f"{tensors} tensors are bit-identical after import and export")


def _import(arguments: argparse.Namespace, dtype: torch.dtype | None) -> None:
    from megabyte_distill.conversion.hf_import import import_teacher

    config = import_teacher(
        arguments.hf_model,
        arguments.megatron_path,
        dtype=dtype,
        tensor_parallel=arguments.tp,
        pipeline_parallel=arguments.pp,
        overwrite=arguments.overwrite,
        show=shown,
    )
    print(f"wrote {arguments.megatron_path}: {config.family}, {config.num_layers} layers, W = {config.vocab_size}")


def _export(arguments: argparse.Namespace, dtype: torch.dtype | None) -> None:
    from megabyte_distill.conversion.hf_export import export_teacher
    from megabyte_distill.conversion.student_export import export_student
    from megabyte_distill.conversion.teacher_folder import stored_dtype
    from megabyte_distill.conversion.tokenizer_files import TOKENIZER_FOLDER
    from megabyte_distill.runs import load_student, speaking_stage

    if arguments.teacher:
        export_teacher(
            arguments.megatron_path,
            arguments.hf_path,
            dtype=dtype,
            overwrite=arguments.overwrite,
            show=shown,
        )
        print(f"wrote {arguments.hf_path}")
        return
    run, stage = split_stage(arguments.megatron_path)
    loaded = load_student(run, speaking_stage(run, stage))
    export_student(
        loaded.student,
        loaded.model_config,
        run / TOKENIZER_FOLDER,
        arguments.hf_path,
        dtype=dtype or stored_dtype(loaded.checkpoint),
        paths=4 if arguments.paths is None else arguments.paths,
        boundary_threshold=arguments.boundary_threshold,
        overwrite=arguments.overwrite,
        show=shown,
    )
    print(f"wrote {arguments.hf_path}: the student after stage {loaded.stage}")


def _compare(arguments: argparse.Namespace) -> None:
    from megabyte_distill.conversion.compare import DEFAULT_TEXT, compare_logits

    text = arguments.text or DEFAULT_TEXT
    if arguments.text_file is not None:
        text = arguments.text_file.read_text(encoding="utf-8")
    result = compare_logits(arguments.hf_model, arguments.megatron_path, text)
    if arguments.json:
        print(json.dumps(dataclasses.asdict(result)))
        return
    if arguments.per_position:
        for position, one in enumerate(result.per_position):
            print(f"{position:>5}  {one.max_abs_logit_difference:.3e}  {one.text!r}")
    where = f"position {result.largest_at} {result.per_position[result.largest_at].text!r}"
    print(
        f"largest logit difference {result.max_abs_logit_difference:.3e} over {result.tokens} positions, at {where} "
        f"(largest logit {result.max_abs_logit:.2f})"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_tool(build_parser(), run, argv, check=check)


if __name__ == "__main__":
    sys.exit(main())
