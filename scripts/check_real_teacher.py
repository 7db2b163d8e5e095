"""Checks a conversion on real weights: logits, every tensor's bits, and the greedy continuation against transformers.

    python scripts/check_real_teacher.py --hf-model DIR

DIR is a Hugging Face folder that `tools/convert_checkpoint.py import` takes. The conversion lies in the temporary
folder (TMPDIR). Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megabyte_distill.config import ranges
from megabyte_distill.data.progress import shown
from megabyte_distill.parallel.process_groups import world
from megabyte_distill.tool import Failure, ToolParser, in_range, run_tool

_MAX_LOGIT_DIFFERENCE = 1e-4


def build_parser() -> ToolParser:
    """The command line."""
    parser = ToolParser(description=__doc__, failure="the converted model is not the original one")
    model = parser.add_argument_group("model").add_argument
    model("--hf-model", type=Path, required=True, metavar="DIR", help="Hugging Face model folder")
    text = parser.add_argument_group("continuation").add_argument
    text("--prompt", default="The capital of France is", metavar="TEXT",
         help="what is continued (The capital of France is)")  # fmt: skip
    text("--new-tokens", type=in_range(ranges.SIZE), default=24, metavar="TOKENS",
         help="length of the greedy continuation (24)")  # fmt: skip
    return parser


@torch.no_grad()
def greedy(logits: Callable[[Tensor], Tensor], tokens: Tensor, count: int) -> list[int]:
    """The ``count`` tokens behind ``tokens`` [T]; ``logits`` maps ids [T] to [T, W]."""
    for _ in range(count):
        tokens = torch.cat((tokens, logits(tokens)[-1].argmax().view(1)))
    return tokens[-count:].tolist() if count else []


def check(options: argparse.Namespace, checkpoint: Path) -> dict[str, object]:
    """Converts into ``checkpoint`` and returns what was found."""
    from transformers import AutoModelForCausalLM

    from megabyte_distill.conversion.compare import backbone_logits, compare_logits, roundtrip
    from megabyte_distill.conversion.hf_import import import_teacher
    from megabyte_distill.conversion.teacher_folder import find_teacher, load_teacher
    from megabyte_distill.data import tokenizers

    import_teacher(options.hf_model, checkpoint, show=shown)
    comparison = compare_logits(options.hf_model, checkpoint)
    identical = roundtrip(options.hf_model, show=shown)
    teacher = load_teacher(checkpoint, dtype=torch.float32)
    tokenizer = tokenizers.load(find_teacher(checkpoint).tokenizer)
    [ids] = tokenizer.encode_batch([tokenizer.normalize(options.prompt)])
    prompt = torch.tensor([teacher.token_bytes.start_id, *ids.tolist()])
    reference = AutoModelForCausalLM.from_pretrained(options.hf_model, dtype=torch.float32, local_files_only=True)
    reference.eval()
    ours = greedy(lambda tokens: backbone_logits(teacher.backbone, tokens), prompt, options.new_tokens)
    theirs = greedy(lambda tokens: reference(tokens[None]).logits[0], prompt, options.new_tokens)
    return {
        "max_abs_logit_difference": comparison.max_abs_logit_difference,
        "max_abs_logit": comparison.max_abs_logit,
        "positions": comparison.tokens,
        "bit_identical_tensors": identical,
        "same_greedy_continuation": ours == theirs,
        "continuation": b"".join(teacher.token_bytes[token] for token in ours).decode("utf-8", errors="replace"),
    }


def run(options: argparse.Namespace) -> None:
    """Carries out the check; Failure where something differs."""
    with world(), tempfile.TemporaryDirectory(prefix="megabyte-distill-") as scratch:
        found = check(options, Path(scratch) / "megatron")
    print(json.dumps(found, ensure_ascii=False))
    if found["max_abs_logit_difference"] > _MAX_LOGIT_DIFFERENCE or not found["same_greedy_continuation"]:
        raise Failure(
            f"{options.hf_model}: the converted model is not the original one; the line above says where they differ"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_tool(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
