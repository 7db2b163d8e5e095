"""One update of stage 2b at a real size with random weights: time, bytes a second, MFU and peak memory.

    python benchmarks/training_step.py [--kernels fused reference] [--rows 16384]

A backbone of about 1.1 B parameters with a byte side of 0.27 B, all of it training in bf16 with fp32 masters. MFU
counts the products and attention of forward and backward pass as torch's flop counter sees them.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from megabyte_distill.config.model import BackboneConfig, ByteSideConfig, DechunkMode  # noqa: E402
from megabyte_distill.config.stage import StageConfig  # noqa: E402
from megabyte_distill.config.training import KernelMode  # noqa: E402

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12}
"""Dense bf16, as the vendor states them."""
BACKBONE = BackboneConfig(
    family="llama",
    num_layers=16,
    hidden_size=2048,
    ffn_hidden_size=8192,
    num_attention_heads=32,
    num_query_groups=8,
    head_dim=64,
    vocab_size=32_000,
    norm_eps=1e-5,
    rope_theta=5e5,
)
BYTE_SIDE = ByteSideConfig(backbone_width=BACKBONE.hidden_size, dechunk_mode=DechunkMode.CAUSAL)
WARM_UP, UPDATES = 3, 5


def measure(kernels: Sequence[KernelMode], rows: int) -> dict[str, Any]:
    """Figures by path of the kernels, on the current GPU (or, slowly, the CPU)."""
    from megabyte_distill.parallel.process_groups import world

    with world() as ranks:
        return {mode.value: _measure(mode, rows, ranks) for mode in kernels}


def _measure(mode: KernelMode, row_bytes: int, ranks: Any) -> dict[str, Any]:
    from megabyte_distill.conversion.model_config import ModelConfig
    from megabyte_distill.curriculum.stages import STAGES
    from megabyte_distill.data.mock import MockRowStream
    from megabyte_distill.kernels.selection import choose
    from megabyte_distill.model.student import set_trainable
    from megabyte_distill.runs import build_student
    from megabyte_distill.training.optimizer import wrap_for_training
    from megabyte_distill.training.rows import MicroBatches
    from megabyte_distill.training.step import train_step

    choose(mode, ranks.device)
    stage, on_gpu = STAGES["2b"], ranks.device.type == "cuda"
    config = StageConfig(seq_length=row_bytes, global_batch_size=1, chunk_bucket=256, lr=1e-4)
    with torch.device(ranks.device):  # drawing a billion numbers takes a GPU no time
        student = build_student(ModelConfig(backbone=BACKBONE, byte_side=BYTE_SIDE))
    student.to(device=ranks.device, dtype=torch.bfloat16)
    set_trainable(student, stage.trains(config, BACKBONE))
    trained = wrap_for_training(student, student.config, config, bf16=True)
    objective = stage.objective(config, None, None)
    stream = MockRowStream(BACKBONE.vocab_size, row_bytes=row_bytes, chunk_bucket=config.chunk_bucket, seed=1)
    source = MicroBatches(stream, config, ranks)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds, losses = [], []
    for update in range(WARM_UP + UPDATES):
        rows = source.next_micro_batches()
        started = time.perf_counter()
        report = train_step(trained, objective, rows, update + 1, ranks)
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
        losses.append(report.sums["byte ce"][0] / report.sums["byte ce"][1])
    middle = sorted(seconds[WARM_UP:])[UPDATES // 2]
    flops = _flops(lambda: train_step(trained, objective, rows, WARM_UP + UPDATES + 1, ranks))
    found: dict[str, Any] = {
        "parameters": sum(parameter.numel() for parameter in student.parameters()),
        "row_bytes": row_bytes,
        "seconds": middle,
        "bytes_per_second": row_bytes / middle,
        "tflops": flops / middle / 1e12,
        "losses": losses,
    }
    if on_gpu:
        name = torch.cuda.get_device_name()
        peak = next((value for key, value in PEAK_FLOPS.items() if key in name), None)
        found["mfu"] = flops / middle / peak if peak else None
        found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return found


def _flops(run: Any) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = [mode.value for mode in KernelMode]
    parser.add_argument("--kernels", nargs="+", choices=modes, default=["fused", "reference"], help="paths to measure")
    parser.add_argument("--rows", type=int, default=16_384, help="bytes of a row (16384)")
    arguments = parser.parse_args(argv)
    from megabyte_distill.parallel import cpu_megatron

    cpu_megatron.apply()
    for mode in arguments.kernels:
        found = measure([KernelMode(mode)], arguments.rows)
        print(json.dumps(found), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
