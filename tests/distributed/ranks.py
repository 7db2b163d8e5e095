"""Functions run by two ranks that meet over gloo: torchrun -m tests.distributed.ranks MODULE FUNCTION OUT [SIZE…]

The function gets the :class:`World` and returns what JSON can hold; OUT becomes a list of each rank's answer.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megabyte_distill.parallel.process_groups import world
from tests.pretrain.job import run_as_ranks


def run_ranks(
    folder: Path, module: str, function: str, *, count: int = 2, tensor_parallel: int = 1, pipeline_parallel: int = 1
) -> list[Any]:
    """What each of ``count`` ranks answers, in the order of ranks."""
    if torch.cuda.is_available() and torch.cuda.device_count() < count:
        pytest.skip(f"{count} ranks need as many GPUs, this machine has {torch.cuda.device_count()}; hide it with "
                    "CUDA_VISIBLE_DEVICES= to run them over gloo")  # fmt: skip
    out = folder / f"{function}.json"
    words = ("-m", "tests.distributed.ranks", module, function, str(out), str(tensor_parallel), str(pipeline_parallel))
    done = run_as_ranks(*words, processes=count, timeout=120)
    assert done.returncode == 0, done.stderr
    answers: list[Any] = json.loads(out.read_text())
    return answers


def main(module: str, function: str, out: str, tensor_parallel: str, pipeline_parallel: str) -> None:
    torch.set_num_threads(1)
    with world(tensor_parallel=int(tensor_parallel), pipeline_parallel=int(pipeline_parallel)) as ranks:
        answer = getattr(importlib.import_module(module), function)(ranks)
        answers = [None] * ranks.size
        dist.all_gather_object(answers, answer)
        if ranks.is_main:
            Path(out).write_text(json.dumps(answers))


if __name__ == "__main__":
    main(*sys.argv[1:])
