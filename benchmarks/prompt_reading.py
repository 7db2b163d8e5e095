#!/usr/bin/env python3
"""Reading a prompt: its end alone along the bit histories, the rest in blocks, against all of it along them.

    python benchmarks/prompt_reading.py --load RUN   # a trained student: what follows is scored as well
    python benchmarks/prompt_reading.py              # random weights, shapes of the tiny teacher and of SmolLM2-135M
    python benchmarks/prompt_reading.py --quick      # the tiny shape, shorter prompts

Processor time on one thread, in turns, the least of two. ``time`` is the first over the second;
``bits_per_byte`` says what a model makes of the 200 bytes that follow (mean over the texts), behind either. The last
line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.scoring import PATHS, make_student, sample
from megabyte_distill.inference.bit_paths import BitPaths
from megabyte_distill.inference.prompt_reading import read_prompts
from megabyte_distill.inference.prompts import PATH_WINDOW
from megabyte_distill.model.student import Student
from megabyte_distill.student_folders import open_student

FOLLOWING = 200
WAYS = {"end": PATH_WINDOW, "all": 1 << 30}
"""Bytes at a prompt's end that are read along the paths."""


def bits_of(read: BitPaths, text: torch.Tensor) -> float:
    """Code length of text [L] int64 behind what was read, in bits a byte."""
    total = 0.0
    every = torch.zeros(1, dtype=torch.int64)
    for byte in text:
        total -= float(read.log_probability_of(byte[None]))
        read.advance(byte[None], every)
    return total / math.log(2) / text.shape[0]


@torch.no_grad()
def measure(student: Student, length: int, count: int, is_trained: bool) -> dict[str, Any]:
    """Of ``count`` prompts of so many bytes."""
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    bits: dict[str, list[float]] = {way: [] for way in WAYS}
    for text in sample(length + FOLLOWING, count):
        prompt = bytes(text[:length].tolist())
        best = dict.fromkeys(WAYS, math.inf)
        for _ in range(2):
            for way, path_window in WAYS.items():
                started = time.process_time()
                read = read_prompts(student, [prompt], PATHS, path_window=path_window)
                best[way] = min(best[way], time.process_time() - started)
                if is_trained and len(bits[way]) == len(seconds[way]):
                    bits[way].append(bits_of(read, text[length:]))
        for way in WAYS:
            seconds[way].append(best[way])
    found: dict[str, Any] = {"time": round(sum(seconds["end"]) / sum(seconds["all"]), 4)}
    if is_trained:
        found["bits_per_byte"] = {way: round(statistics.mean(values), 4) for way, values in bits.items()}
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--load", type=Path, metavar="DIR", help="a run or an export (default: random weights)")
    parser.add_argument("--quick", action="store_true", help="one shape, shorter prompts")
    parser.add_argument("--texts", type=int, default=4, help="prompts of each length (4)")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    lengths = (512, 1024) if arguments.quick else (1024, 4096)
    count = 1 if arguments.quick else arguments.texts
    shapes = ("run",) if arguments.load else ("tiny",) if arguments.quick else ("tiny", "smollm2")
    found = {}
    for shape in shapes:
        opened: AbstractContextManager[Student]
        opened = open_student(arguments.load) if arguments.load else nullcontext(make_student(shape))
        with opened as student:
            for length in lengths:
                name = f"{shape}, {length} bytes"
                found[name] = measure(student, length, count, arguments.load is not None)
                print(name, json.dumps(found[name]), flush=True)
    print(json.dumps({"paths": PATHS, "path_window": PATH_WINDOW, "cases": found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
