#!/usr/bin/env python3
"""Training steps at a published model's shape, on one GPU: speed, memory, and what the fused kernels change.

    python benchmarks/gpu_training.py [--preset olmo2-1b] [--stages 1b,2a,2b] [--rows 4] [training's flags]

Weights and text are random, everything else is a training run's own: bf16, AdamW over fp32 masters, packed documents.
Every stage runs with --kernels reference and fused, one behind the other; the ratio of their times is the figure. MFU
is the counted products (matrices and attention) over the time, as a share of what an 8192³ bf16 product reaches here.
--quick takes a tiny model and runs anywhere. The last line is JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]
warnings.simplefilter("ignore")

from megabyte_distill.config import Settings, parse_arguments  # noqa: E402 - after the path is set
from megabyte_distill.config.model import BackboneConfig  # noqa: E402
from megabyte_distill.config.published import PUBLISHED_BACKBONES  # noqa: E402
from megabyte_distill.config.training import KernelMode  # noqa: E402
from megabyte_distill.conversion.model_config import ModelConfig  # noqa: E402
from megabyte_distill.curriculum.stage import TeacherNeed  # noqa: E402
from megabyte_distill.curriculum.stages import STAGES  # noqa: E402
from megabyte_distill.data.micro_batch import concatenate_rows  # noqa: E402
from megabyte_distill.data.mock import MockRowStream, mock_table  # noqa: E402
from megabyte_distill.data.sampler import RowStream  # noqa: E402
from megabyte_distill.data.token_bytes import TokenBytes  # noqa: E402
from megabyte_distill.kernels.selection import choose  # noqa: E402
from megabyte_distill.memory.planned_stages import planned_stages  # noqa: E402
from megabyte_distill.model.backbone import Backbone, transformer_config  # noqa: E402
from megabyte_distill.model.student import set_trainable  # noqa: E402
from megabyte_distill.parallel.process_groups import World, world  # noqa: E402
from megabyte_distill.runs import backbone_overrides, build_student, training_dtype  # noqa: E402
from megabyte_distill.training.optimizer import wrap_for_training  # noqa: E402
from megabyte_distill.training.step import train_step  # noqa: E402
from megabyte_distill.training.throughput import FlopCount  # noqa: E402

WARM_UP = 2
TINY = BackboneConfig(
    family="llama", num_layers=2, hidden_size=64, ffn_hidden_size=128, num_attention_heads=4, num_query_groups=2,
    head_dim=16, vocab_size=512, norm_eps=1e-5, rope_theta=1e4,
)  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--preset", default="olmo2-1b", help="a published model (olmo2-1b)")
    add("--stages", default="1b,2a,2b", help="stages, separated by commas (1b,2a,2b)")
    add("--rows", type=int, default=4, help="rows of a micro-batch, one micro-batch an update (4)")
    add("--seq-length", type=int, default=8192, help="bytes of a row (8192)")
    add("--updates", type=int, default=5, help="timed updates (5)")
    add("--kernels", default="reference,fused", help="what is run beside each other (reference,fused)")
    add("--profile", action="store_true", help="print what one update of each spends its time on")
    add("--quick", action="store_true", help="a tiny model, under a minute on a CPU")
    return parser


def product_rate(device: torch.device) -> float:
    """FLOP/s of an 8192³ bf16 product (512³ without a GPU)."""
    size = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = min(timed(lambda: a @ b, device) for _ in range(8))
    return 2.0 * size**3 / seconds


def timed(action: Callable[[], object], device: torch.device) -> float:
    """Seconds, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


class Trial:
    """One stage of one model, ready to be updated."""

    def __init__(
        self,
        settings: Settings,
        backbone: BackboneConfig,
        name: str,
        here: World,
        text: tuple[RowStream, TokenBytes] | None = None,
    ) -> None:
        """``text``: rows and their token table in place of random ones."""
        config, stage, dtype = settings.stages[name], STAGES[name], training_dtype(settings)
        overrides = {**backbone_overrides(settings, config), "perform_initialization": False}
        byte_side = settings.model.byte_side_for(backbone.hidden_size)
        student = build_student(ModelConfig(backbone=backbone, byte_side=byte_side), overrides=overrides)
        student.to(device=here.device, dtype=dtype)
        draw(student.backbone)
        set_trainable(student, stage.trains(config, backbone))
        teacher = None
        if stage.teacher(config) is not TeacherNeed.NONE:
            teacher = student.backbone
            shares_teacher = {one.name: one.shares_teacher for one in planned_stages(settings, backbone)}
            if not shares_teacher[name]:
                teacher = Backbone(backbone, transformer_config(backbone, **overrides)).to(here.device, dtype)
                draw(teacher)
                teacher.requires_grad_(False).eval()
        stream, table = text or (
            MockRowStream(backbone.vocab_size, row_bytes=config.seq_length, chunk_bucket=config.chunk_bucket, seed=1),
            mock_table(backbone.vocab_size),
        )
        self.objective = stage.objective(config, teacher, table)
        self.trained = wrap_for_training(student, student.config, config, bf16=settings.run.bf16)
        student.train()
        self.rows = [
            concatenate_rows([stream.materialize(plan) for plan in stream.next_rows(config.micro_batch_size)]).to(
                here.device
            )
            for _ in range(4)
        ]
        self.bytes = config.micro_batch_size * config.seq_length
        self.world = here
        self.updates = 0

    def update(self) -> None:
        row = self.rows[self.updates % len(self.rows)]
        report = train_step(self.trained, self.objective, [row], self.updates, self.world)
        assert not report.skipped, report
        self.updates += 1


def draw(module: torch.nn.Module) -> None:
    """Random matrices, and ones for norms."""
    for name, parameter in module.named_parameters():
        is_norm = parameter.dim() == 1 or "norm" in name
        torch.nn.init.ones_(parameter) if is_norm else torch.nn.init.normal_(parameter, std=0.02)


def run_stage(
    settings: Settings,
    backbone: BackboneConfig,
    name: str,
    kernels: str,
    updates: int,
    here: World,
    *,
    profile: bool = False,
) -> dict[str, float]:
    """Seconds an update (the median), bytes/s, TFLOP/s and GiB at most."""
    choose(KernelMode(kernels), here.device)
    trial = Trial(settings, backbone, name, here)
    with FlopCount() as count:
        trial.update()
    for _ in range(WARM_UP):
        trial.update()
    if here.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = sorted(timed(trial.update, here.device) for _ in range(updates))[updates // 2]
    if profile:
        print_profile(trial, here.device)
    peak = torch.cuda.max_memory_allocated() if here.device.type == "cuda" else 0
    return {
        "seconds": seconds,
        "bytes_per_second": trial.bytes / seconds,
        "tflops": count.flops / seconds / 1e12,
        "gib": peak / 2**30,
    }


def print_profile(trial: Trial, device: torch.device) -> None:
    """Where the device's and the host's time of one update goes."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        timed(trial.update, device)
    events = profiler.key_averages()
    for order in ("self_device_time_total", "self_cpu_time_total")[device.type != "cuda" :]:
        print(events.table(sort_by=order, row_limit=18, max_name_column_width=50))


def line(stage: str, kernels: str, found: dict[str, float]) -> str:
    return (
        f"  {stage} {kernels:10} {found['seconds'] * 1e3:9.1f} ms an update  {found['bytes_per_second']:12,.0f} "
        f"bytes/s  {found['tflops']:7.1f} TFLOP/s  {found['mfu']:6.1%} MFU  {found['gib']:6.1f} GiB"
    )


def main(argv: Sequence[str] | None = None) -> int:
    arguments, others = build_parser().parse_known_args(argv)
    device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    preset = "tiny" if arguments.quick else arguments.preset
    backbone = TINY if arguments.quick else PUBLISHED_BACKBONES[preset]
    rows, length = (2, 512) if arguments.quick else (arguments.rows, arguments.seq_length)
    words = ["--preset", preset, "--mock-data", "--stages", arguments.stages, "--bf16", *others]
    words += ["--seq-length", str(length), "--micro-batch-size", str(rows), "--global-batch-size", str(rows)]
    settings = parse_arguments(words, {"save": "unused"}, world_size=1)
    failed = 0
    results: dict[str, Any] = {"preset": preset, "bytes_per_update": rows * length}
    with world() as here:
        rate = product_rate(device)
        name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
        results |= {"device": name, "product_tflops": rate / 1e12}
        print(f"{name}, torch {torch.__version__}: an 8192³ product runs at {rate / 1e12:.0f} TFLOP/s")
        print(f"{preset}, {rows} rows of {length:,} bytes an update")
        for stage in arguments.stages.split(","):
            for kernels in arguments.kernels.split(","):
                try:
                    found = run_stage(
                        settings, backbone, stage, kernels, arguments.updates, here, profile=arguments.profile
                    )
                except (RuntimeError, ValueError) as error:
                    print(f"  {stage} {kernels:10} {type(error).__name__}: {str(error)[:400]}", flush=True)
                    results[f"{stage}_{kernels}"] = f"{type(error).__name__}: {str(error)[:200]}"
                    failed += 1
                    continue
                finally:
                    gc.collect()
                    if device.type == "cuda":
                        torch.cuda.empty_cache()
                results[f"{stage}_{kernels}"] = {**found, "mfu": found["tflops"] * 1e12 / rate}
                print(line(stage, kernels, results[f"{stage}_{kernels}"]), flush=True)
            pair = [results.get(f"{stage}_{kernels}") for kernels in ("reference", "fused")]
            if all(isinstance(one, dict) for one in pair):
                results[f"{stage}_reference_to_fused"] = pair[0]["seconds"] / pair[1]["seconds"]  # type: ignore[index]
    print(json.dumps(results))
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
