"""What a rank needs, before there is a rank.

    python -m megabyte_distill.memory --preset llama3.2-3b --tp 2 --pp 2 --dp 4 --sequence-parallel --stage 1b

Takes every flag of training, and shorter names for the sizes. Needs no GPU, no teacher on disk and little memory.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from megabyte_distill import __version__
from megabyte_distill.config import ConfigError, Settings, parse_arguments

EXIT_ERROR = 2


def build_parser() -> argparse.ArgumentParser:
    """The flags that training does not have."""
    parser = argparse.ArgumentParser(
        prog="python -m megabyte_distill.memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Beside these, every flag of training (examples/pretrain_byte_kd.sh --help). Exit codes: 0 done; 2 a "
        "mistake, told on stderr.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--tp", type=int, default=1, metavar="T", help="--tensor-model-parallel-size (1)")
    add("--pp", type=int, default=1, metavar="P", help="--pipeline-model-parallel-size (1)")
    add("--dp", type=int, default=1, metavar="D", help="copies of the model that see different rows (1)")
    add("--stage", metavar="S", help="--stages: 1b, or 1a,2b (all)")
    add("--hf-model", type=Path, metavar="DIR", help="take the backbone's shape from a Hugging Face config.json")
    add("--bytes-per-chunk", type=float, default=4.4, help="mean length of a token of the teacher in the text (4.4)")
    add("--version", action="version", version=f"megabyte-distill {__version__}")
    add("--json", action="store_true", help="print a JSON list, sizes in bytes")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; 0, or 2 with what is wrong."""
    arguments, others = build_parser().parse_known_args(argv)
    warnings.simplefilter("ignore")  # of megatron and torch among themselves
    try:
        world_size = arguments.tp * arguments.pp * arguments.dp
        settings = _settings(arguments, others, world_size)
        from megabyte_distill.memory.estimate import estimate
        from megabyte_distill.memory.report import as_json, backbone_of, heading, table

        backbone = backbone_of(settings, arguments.hf_model)
        memories = estimate(settings, backbone, world_size=world_size, bytes_per_chunk=arguments.bytes_per_chunk)
        if arguments.json:
            print(json.dumps([as_json(memory) for memory in memories], indent=2))
            return 0
        print(heading(settings, backbone, world_size, arguments.bytes_per_chunk))
        for line in table(memories):
            print(line, flush=True)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_ERROR
    return 0


def _settings(arguments: argparse.Namespace, others: Sequence[str], world_size: int) -> Settings:
    words = list(others)
    for flag, value in (
        ("--tensor-model-parallel-size", arguments.tp),
        ("--pipeline-model-parallel-size", arguments.pp),
        ("--stages", arguments.stage),
    ):
        if value is not None:
            words += [flag, str(value)]
    if world_size < 1:
        raise ConfigError([f"--tp {arguments.tp} --pp {arguments.pp} --dp {arguments.dp}: expected sizes from 1 up"])
    defaults = {"mock_data": True, "preset": "llama3.2-3b"}
    return parse_arguments(words, defaults, world_size=world_size, warn=lambda text: print(f"warning: {text}"))


if __name__ == "__main__":
    raise SystemExit(main())
