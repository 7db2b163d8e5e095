#!/usr/bin/env python3
"""What scoring costs a byte: K = 4 bit histories against one, and against one pass under given bits, side by side.

    python benchmarks/scoring.py             # shapes of the tiny teacher and of SmolLM2-135M, 512 and 2,048 bytes
    python benchmarks/scoring.py --quick     # the tiny shape, short texts: shows that it runs

Random weights (speed does not depend on them) whose head is shifted so that chunks have about 4 bytes, on one thread;
arms alternate and the repeat with the least processor time counts. ``k4_cost_per_byte_over_one_path_times_k`` is the
worst case's time along four paths over four times that along one. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402 - after the path is set
import torch  # noqa: E402

from megabyte_distill.alphabet import BYTE_VOCAB  # noqa: E402
from megabyte_distill.config.model import BackboneConfig, ByteMixer, ByteSideConfig  # noqa: E402
from megabyte_distill.data.packing import PackedRow, Segment, pack_row  # noqa: E402
from megabyte_distill.hf.torch_backbone import TorchBackbone  # noqa: E402
from megabyte_distill.inference.scoring import score_paths, score_row  # noqa: E402
from megabyte_distill.model.student import Gold, RouterDecides, Student  # noqa: E402

PATHS = 4
TEXT = ROOT / "examples" / "tiny" / "heldout.jsonl.xz"
SHIFT = 1.1
"""Added to the log-odds of a byte that goes on: about every fourth ends a chunk."""
SHAPES = {
    "tiny": BackboneConfig(
        family="llama", num_layers=6, hidden_size=192, ffn_hidden_size=512, num_attention_heads=6, num_query_groups=2,
        head_dim=32, vocab_size=4096, norm_eps=1e-5, rope_theta=1e4, tied_embeddings=True,
    ),
    "smollm2": BackboneConfig(
        family="llama", num_layers=30, hidden_size=576, ffn_hidden_size=1536, num_attention_heads=9,
        num_query_groups=3, head_dim=64, vocab_size=49152, norm_eps=1e-5, rope_theta=1e5, tied_embeddings=True,
        max_position_embeddings=8192,
    ),
}  # fmt: skip
WIDTHS = {"tiny": (128, 1024, 384, 512, 256), "smollm2": (384, 1536, 1024, 1536, 768)}
"""Byte width, then the hidden sizes of encoder head, decoder head, router and mixers."""


@dataclass(frozen=True)
class Case:
    """One shape and length."""

    shape: str
    length: int
    texts: int
    repeats: int


class Shifted(torch.nn.Module):
    """A head whose bits are as rare as a trained one's."""

    def __init__(self, head: torch.nn.Module) -> None:
        super().__init__()
        self.head = head
        self.register_buffer("shift", torch.cat((torch.full((BYTE_VOCAB,), SHIFT), torch.zeros(BYTE_VOCAB))))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits [.., 512]."""
        shifted: torch.Tensor = self.head(x) + self.shift
        return shifted


def make_student(shape: str) -> Student:
    """Random weights, the tiny preset's byte mixers."""
    torch.manual_seed(0)
    width, encoder, decoder, router, mixer = WIDTHS[shape]
    backbone = SHAPES[shape]
    config = ByteSideConfig(
        backbone_width=backbone.hidden_size, byte_width=width, byte_mixer=ByteMixer.CONV, encoder_layers=2,
        decoder_layers=2, encoder_ffn_hidden_size=encoder, decoder_ffn_hidden_size=decoder, router_hidden_size=router,
        conv_ffn_hidden_size=mixer, conv_dilations=(1, 4),
    )  # fmt: skip
    student = Student(config, TorchBackbone(backbone)).eval()
    student.byte_decoder.head = Shifted(student.byte_decoder.head)
    return student.requires_grad_(False)


def sample(length: int, count: int) -> list[torch.Tensor]:
    """Pieces of real text, [length] each."""
    lines = lzma.decompress(TEXT.read_bytes()).decode().splitlines()
    joined = "".join(json.loads(line)["text"] for line in lines).encode()
    step = (len(joined) - length) // count
    return [torch.tensor(list(joined[i * step : i * step + length])) for i in range(count)]


def packed(texts: Sequence[torch.Tensor]) -> PackedRow:
    """The texts as one row, cut behind every fourth byte."""
    segments = []
    for text in texts:
        lengths = np.array([4] * (len(text) // 4) + [len(text) % 4] * bool(len(text) % 4))
        segments.append(
            Segment(
                document=0,
                byte_ids=text.numpy().astype(np.uint8),
                tokens=np.zeros(len(lengths), dtype=np.int64),
                token_lengths=lengths,
                next_byte=None,
                next_token=None,
                next_token_length=None,
            )
        )
    size = sum(len(text) + 1 for text in texts)
    return pack_row(segments, row_bytes=size, chunk_bucket=1, start_id=0, end_of_text_id=1)


def measure(case: Case) -> dict[str, float]:
    """Microseconds a byte of each arm, and their ratios."""
    student, texts = make_student(case.shape), sample(case.length, case.texts)
    row = packed(texts)
    arms: dict[str, Callable[[], Any]] = {
        "one_path": lambda: score_paths(student, texts, paths=1),
        "k4": lambda: score_paths(student, texts, paths=PATHS),
        "gold_pass": lambda: score_row(student, row, Gold()),
        "router_pass": lambda: score_row(student, row, RouterDecides()),
    }
    best = dict.fromkeys(arms, math.inf)
    for _ in range(case.repeats):
        for name, work in arms.items():
            started = time.process_time()
            work()
            best[name] = min(best[name], time.process_time() - started)
    each = {f"{name}_us_per_byte": 1e6 * seconds / (case.length * case.texts) for name, seconds in best.items()}
    return {
        **{name: round(value, 2) for name, value in each.items()},
        "k4_over_one_path_times_k": round(best["k4"] / best["one_path"] / PATHS, 3),
        "k4_over_router_pass_times_k": round(best["k4"] / best["router_pass"] / PATHS, 3),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--quick", action="store_true", help="one shape, short texts")
    parser.add_argument("--texts", type=int, default=8, help="texts that run side by side (8)")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    if arguments.quick:
        cases = [Case("tiny", 96, 4, 3)]
    else:
        cases = [
            Case(shape, length, texts, 2)
            for shape, length in (("tiny", 512), ("tiny", 2048), ("smollm2", 512), ("smollm2", 2048))
            for texts in (1, arguments.texts)
        ]
    found = {}
    for case in cases:
        name = f"{case.shape}, {case.texts} × {case.length} bytes"
        found[name] = measure(case)
        print(name, json.dumps(found[name]), flush=True)
    worst = max(figures["k4_over_one_path_times_k"] for figures in found.values())
    print(json.dumps({"paths": PATHS, "k4_cost_per_byte_over_one_path_times_k": worst, "cases": found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
