#!/usr/bin/env python3
"""Bytes between pipeline stages for each micro-batch, and gradient bytes reduced for each update, against the least.

    python benchmarks/pipeline_bytes.py             # the published models at tensor 2 × pipeline 4 × data 8
    python benchmarks/pipeline_bytes.py --quick     # one of them with short rows: shows that it runs
    python benchmarks/pipeline_bytes.py --quick --num-virtual-stages-per-pipeline-rank 2 --global-batch-size 32

Flags of training are taken as well. With V virtual stages there are pipeline × V - 1 boundaries, each as wide as one
without them.

Nothing is sent: each rank's part of the job is built and run without memory, and what is counted are the buffers that
training would hand to the network (the payload that goes on, the gradient that comes back, DDP's gradient buffers).
Sizes are a rank's: with sequence parallelism each tensor-parallel rank sends its own part.

The least possible is what no schedule could do without, in the dtype of the weights: forward, the backbone's state of
the chunks that are real, the encoder's state of every byte where the decoder runs, the teacher's state where one runs
beside; backward, the gradient of those that something behind the boundary still trains; of the update, one fp32 number
a trained parameter. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from megabyte_distill.config import Settings, parse_arguments  # noqa: E402 - after the path is set
from megabyte_distill.config.model import BackboneConfig  # noqa: E402
from megabyte_distill.config.published import PUBLISHED_BACKBONES  # noqa: E402
from megabyte_distill.config.stage import StageConfig  # noqa: E402
from megabyte_distill.curriculum.stage import TeacherNeed  # noqa: E402
from megabyte_distill.curriculum.stages import STAGES, resolved_stages  # noqa: E402

PRESETS = ("llama3.2-3b", "qwen3-4b", "olmo2-1b")
TENSOR, PIPELINE, DATA = 2, 4, 8
BYTES_PER_CHUNK = 4.4
GRADIENT_BYTES = 4
"""Gradients are summed and reduced in fp32."""


def settings_of(preset: str, flags: Sequence[str]) -> Settings:
    """The job that is looked at."""
    layout = f"--tensor-model-parallel-size {TENSOR} --pipeline-model-parallel-size {PIPELINE} --sequence-parallel"
    words = ["--mock-data", "--preset", preset, *layout.split(), "--use-distributed-optimizer", *flags]
    return parse_arguments(words, world_size=TENSOR * PIPELINE * DATA)


def least(stage: str, config: StageConfig, backbone: BackboneConfig, real_chunks: int) -> tuple[float, float]:
    """(forward, backward) bytes of a micro-batch that must pass each boundary, on one of the tensor-parallel ranks."""
    if stage in ("1a", "1c"):
        return 0.0, 0.0  # the losses are complete on the first stage
    chunk_state = real_chunks * backbone.hidden_size * 2 / TENSOR
    byte_state = config.seq_length * config.micro_batch_size * backbone.hidden_size * 2 / TENSOR
    has_teacher = STAGES[stage].teacher(config) is TeacherNeed.FROZEN
    has_decoder = stage in ("2a", "2b")
    student = chunk_state + byte_state * has_decoder
    trains_before = stage in ("1b", "2b")
    return student + chunk_state * has_teacher, student * trains_before


def measure(preset: str, flags: Sequence[str]) -> Iterator[dict[str, Any]]:
    """One entry a stage of the curriculum."""
    from megabyte_distill.memory.estimate import estimate
    from megabyte_distill.memory.even_rows import even_row

    settings, backbone = settings_of(preset, flags), PUBLISHED_BACKBONES[preset]
    world_size = TENSOR * PIPELINE * DATA
    memories = list(estimate(settings, backbone, world_size=world_size, bytes_per_chunk=BYTES_PER_CHUNK))
    for stage, config in resolved_stages(settings.stages).items():
        ranks = [memory for memory in memories if memory.stage == stage]
        chunks = int(even_row(config, BYTES_PER_CHUNK).token_mask.sum())
        # in the order in which a micro-batch passes them
        passed = [part for of_all in zip(*(rank.virtual_stages for rank in ranks), strict=True) for part in of_all]
        forward, backward = least(stage, config, backbone, chunks)
        reduced, needed = sum(r.gradients for r in ranks), GRADIENT_BYTES * sum(r.trained for r in ranks)
        yield {
            "preset": preset,
            "stage": stage,
            "sent": [part.sent for part in passed[:-1]],
            "least_sent": forward,
            "returned": [part.returned for part in passed[1:]],
            "least_returned": backward,
            "gradients": reduced,
            "least_gradients": needed,
            "micro_batches": config.micro_batches(DATA),
        }


def ratio(actual: float, least_possible: float) -> str:
    """How many times the least, or that nothing need pass."""
    return f"{actual / least_possible:.4f}" if least_possible else "–"


def line(entry: dict[str, Any]) -> str:
    """A row of the table; the widest boundary stands for all."""
    sent, returned = max(entry["sent"]), max(entry["returned"])
    return (
        f"{entry['preset']:12} {entry['stage']}  {sent / 1e6:10.3f} {ratio(sent, entry['least_sent']):>8}"
        f"  {returned / 1e6:10.3f} {ratio(returned, entry['least_returned']):>8}"
        f"  {entry['gradients'] / 1e6:11.1f} {ratio(entry['gradients'], entry['least_gradients']):>8}"
        f"  {len(entry['sent']):10}"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table and the JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--quick", action="store_true", help="one model, rows of 1024 bytes")
    arguments, others = parser.parse_known_args(argv)
    warnings.simplefilter("ignore")  # of megatron and torch among themselves
    flags = ["--seq-length", "1024", "--global-batch-size", "16"] if arguments.quick else []
    flags += others
    presets = PRESETS[-1:] if arguments.quick else PRESETS
    print(
        f"tensor {TENSOR} × pipeline {PIPELINE} × data {DATA}, sequence parallel; megabytes a rank, and times the "
        "least; a micro-batch's are those of each boundary"
    )
    columns = ("forward, a micro-batch", "backward, a micro-batch", "gradients, an update", "boundaries")
    print(f"{'':15} {columns[0]:>20} {columns[1]:>22} {columns[2]:>21}  {columns[3]}")
    entries: list[dict[str, Any]] = []
    for preset in presets:
        for entry in measure(preset, flags):
            print(line(entry), flush=True)
            entries.append(entry)
    print(json.dumps({"tensor": TENSOR, "pipeline": PIPELINE, "data": DATA, "entries": entries}))


if __name__ == "__main__":
    main()
