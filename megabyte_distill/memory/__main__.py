"""What a rank needs, before there is a rank.

    python -m megabyte_distill.memory --preset llama3.2-3b --tp 2 --pp 2 --dp 4 --sequence-parallel --stage 1b

Beside the flags below it takes every flag of training (examples/pretrain_byte_kd.sh --help); --preset is llama3.2-3b
where it is not given. Needs no GPU, no teacher on disk and little memory.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from megabyte_distill.config import ConfigError, Settings, parse_arguments, ranges
from megabyte_distill.config.flags import read_flags
from megabyte_distill.config.layers import all_options
from megabyte_distill.tool import ToolParser, in_range, run_tool

_SHORT = {"tp": "tensor-model-parallel-size", "pp": "pipeline-model-parallel-size", "stage": "stages"}
"""Flags of training that have another name here as well."""
_DEFAULTS = {"mock_data": True, "preset": "llama3.2-3b"}


def build_parser() -> ToolParser:
    """The flags that training does not have."""
    parser = ToolParser(prog="python -m megabyte_distill.memory", description=__doc__)
    ranks = parser.add_argument_group("ranks")
    count = in_range(ranges.COUNT)
    ranks.add_argument("--tp", type=count, metavar="T", help=f"short for --{_SHORT['tp']} (1)")
    ranks.add_argument("--pp", type=count, metavar="P", help=f"short for --{_SHORT['pp']} (1)")
    ranks.add_argument("--dp", type=count, default=1, metavar="D",
                       help="copies of the model that see different rows (1)")  # fmt: skip
    run = parser.add_argument_group("run")
    run.add_argument("--stage", metavar="S", help="short for --stages: 1b, or 1a,2b (1a,1b,1c,2a,2b)")
    run.add_argument("--hf-model", type=Path, metavar="DIR",
                     help="folder whose config.json has the backbone's shape (by --load or --preset)")  # fmt: skip
    run.add_argument("--bytes-per-chunk", type=in_range(ranges.Range(low=1)), default=4.4, metavar="BYTES",
                     help="mean length of a token of the teacher in the text (4.4)")  # fmt: skip
    parser.add_argument_group("output").add_argument(
        "--json", action="store_true", help="print a JSON list, sizes in bytes, instead of a table in GiB"
    )
    return parser


def check(arguments: argparse.Namespace) -> Iterator[str]:
    """What is wrong with training's flags, and with those given by both their names."""
    given = read_flags(arguments.others, all_options()).common
    for short, name in _SHORT.items():
        if getattr(arguments, short) is not None and name.replace("-", "_") in given:
            yield f"--{short}: is short for --{name}, which is given as well; leave one of them out"
    try:
        _settings(arguments)
    except ConfigError as error:
        yield from error.problems


def run(arguments: argparse.Namespace) -> None:
    """Prints the table, or JSON; warnings go to stderr."""
    settings = _settings(arguments, warn=lambda text: print(f"warning: {text}", file=sys.stderr))
    world_size = arguments.dp * settings.parallel.model_parallel_size
    # megatron takes seconds to import, which --help and a mistyped flag should not
    from megabyte_distill.memory.estimate import estimate
    from megabyte_distill.memory.report import as_json, backbone_of, heading, table

    backbone = backbone_of(settings, arguments.hf_model)
    memories = estimate(settings, backbone, world_size=world_size, bytes_per_chunk=arguments.bytes_per_chunk)
    if arguments.json:
        print(json.dumps([as_json(memory) for memory in memories], indent=2))
        return
    print(heading(settings, backbone, world_size, arguments.bytes_per_chunk))
    for line in table(memories):
        print(line, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_tool(build_parser(), run, argv, check=check, takes_others=True)


def _settings(arguments: argparse.Namespace, warn: Callable[[str], None] | None = None) -> Settings:
    words = list(arguments.others)
    for short, name in _SHORT.items():
        value = getattr(arguments, short)
        if value is not None:
            words += [f"--{name}", str(value)]
    given = read_flags(words, all_options()).common
    model_parallel = given.get("tensor_model_parallel_size", 1) * given.get("pipeline_model_parallel_size", 1)
    return parse_arguments(words, _DEFAULTS, world_size=arguments.dp * max(1, model_parallel), warn=warn)


if __name__ == "__main__":
    raise SystemExit(main())
