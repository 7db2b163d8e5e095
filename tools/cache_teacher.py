"""Stores the teacher's exact byte targets, so that training reads them instead of running the teacher.

    python tools/cache_teacher.py --load CKPT --data-path data/corpus_text_document --logits-save-dir CACHE
    torchrun examples/pretrain_byte_kd.sh … --byte-targets exact --logits-load-dir CACHE

Killed at any moment, the same command goes on with the first shard that is missing; a complete cache is verified.
Under torchrun each rank makes its share.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megabyte_distill.alphabet import JOINT_CLASSES
from megabyte_distill.config import ranges
from megabyte_distill.config.blend import parse_split
from megabyte_distill.data.named_sets import set_problems
from megabyte_distill.tool import ToolParser, folder_to_read, in_range, judged, run_tool

if TYPE_CHECKING:
    from megabyte_distill.pretrain.cache_teacher import CacheSettings


def build_parser() -> ToolParser:
    """The command line."""
    parser = ToolParser(description=__doc__)
    source = parser.add_argument_group("teacher and text").add_argument
    source("--load", type=judged(folder_to_read), required=True, metavar="CKPT", help="folder of the converted teacher")
    source("--data-path", nargs="+", required=True, default=[], metavar="STEM",
        help="data sets, PREFIX_KEY_document; weights are read over")  # fmt: skip
    source("--split", type=judged(parse_split), metavar="T,V,S",
        help="only the training share T of each set, as training cuts it (default: all)")  # fmt: skip
    cache = parser.add_argument_group("cache").add_argument
    cache("--logits-save-dir", type=Path, required=True, metavar="DIR", help="folder of the cache")
    cache("--logits-save-top-k", type=in_range(ranges.Range(low=1, high=JOINT_CLASSES, whole=True)), default=32,
        metavar="K", help=f"pairs stored a byte, {JOINT_CLASSES} keeps all (32)")  # fmt: skip
    cache("--shard-bytes", type=in_range(ranges.COUNT), default=8 << 20, metavar="BYTES",
        help="text of a shard, about (8388608)")  # fmt: skip
    cache("--json", action="store_true", help="print one JSON object at the end (default: a sentence)")
    work = parser.add_argument_group("teacher's passes").add_argument
    work("--context-tokens", type=in_range(ranges.COUNT), metavar="TOKENS",
        help="tokens of a document that the teacher reads at once (2048, or what it has positions for)")  # fmt: skip
    work("--overlap-tokens", type=in_range(ranges.SIZE), metavar="TOKENS",
        help="of them, those repeated from before as context (a quarter)")  # fmt: skip
    work("--micro-batch-tokens", type=in_range(ranges.COUNT), default=8192, metavar="TOKENS",
        help="tokens side by side in the teacher, about (8192)")  # fmt: skip
    work("--bf16", action="store_true", help="run the teacher in bfloat16 (default: as it is stored)")
    return parser


def check(arguments: argparse.Namespace) -> Iterable[str]:
    """What is wrong with the data sets that the flags name."""
    yield from set_problems(arguments.data_path)


def run(arguments: argparse.Namespace) -> None:
    """Makes the cache; ValueError for what the user can mend."""
    import torch

    from megabyte_distill.conversion.teacher_folder import find_teacher, load_teacher
    from megabyte_distill.data.dataset import Part, open_blend
    from megabyte_distill.parallel import cpu_megatron
    from megabyte_distill.parallel.cpu_memory import keep_large_buffers
    from megabyte_distill.parallel.process_groups import world
    from megabyte_distill.pretrain.cache_teacher import make_cache
    from megabyte_distill.training.target_cache import teacher_hash

    if cpu_megatron.apply():
        keep_large_buffers()
    # ranks wait for the slowest one at the end
    with world(timeout_minutes=24 * 60) as ranks:
        stored = find_teacher(arguments.load)
        settings = _settings(arguments, stored.config.max_position_embeddings)
        blend = open_blend(arguments.data_path, tokenizer_hash=stored.token_bytes.hash)
        name = teacher_hash(stored.checkpoint)
        teacher = load_teacher(arguments.load, dtype=torch.bfloat16 if arguments.bf16 else None)
        report = make_cache(
            arguments.logits_save_dir,
            teacher.backbone.requires_grad_(False).eval(),
            teacher.token_bytes,
            blend.part(Part.TRAINING, arguments.split).datasets,
            settings,
            teacher_hash=name,
            world=ranks,
            say=lambda text: print(f"[{ranks.rank}] {text}" if ranks.size > 1 else text, file=sys.stderr, flush=True),
        )
        if not ranks.is_main:
            return
    if arguments.json:
        print(json.dumps(report.as_dict()))
        return
    print(
        f"{report.documents:,} documents, {report.text_bytes:,} bytes of text in {report.shards} shards; "
        f"{report.cache_bytes_per_text_byte:.2f} bytes on the disk and {report.entries_per_target:.2f} pairs a byte of "
        f"text; hard labels: {report.replaced:.2e} of all bytes; teacher's mass left out: {report.excluded:.2e}\n"
        f"--logits-load-dir {arguments.logits_save_dir}"
    )


def _settings(arguments: argparse.Namespace, positions: int) -> CacheSettings:
    from megabyte_distill.pretrain.cache_teacher import CacheSettings

    longest = positions - 1
    context = min(2048, longest) if arguments.context_tokens is None else arguments.context_tokens
    if context > longest:
        raise ValueError(
            f"--context-tokens: got {context}, expected at most {longest}; the teacher has {positions} positions "
            "(max_position_embeddings), one of them for a document's start"
        )
    return CacheSettings(
        top_k=arguments.logits_save_top_k,
        context_tokens=context,
        overlap_tokens=context // 4 if arguments.overlap_tokens is None else arguments.overlap_tokens,
        shard_bytes=arguments.shard_bytes,
        batch_tokens=arguments.micro_batch_tokens,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_tool(build_parser(), run, argv, check=check)


if __name__ == "__main__":
    sys.exit(main())
