"""Every stage's first three updates, from one checkpoint, on the ranks that run this file, at each way to cut them.

    torchrun --nproc-per-node N tests/distributed/stage_cases.py START OUTPUT

Writes to OUTPUT, by layout and case: losses, gradient norms, and what of the backbone changed.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

from megabyte_distill.config.model import ByteMixer, DechunkMode  # noqa: E402 - after the path is set
from megabyte_distill.config.stage import BoundarySource, ByteTargets, StageConfig, TargetsFrom  # noqa: E402
from megabyte_distill.conversion.model_config import ModelConfig  # noqa: E402
from megabyte_distill.conversion.teacher_folder import TeacherHolder, load_first_layers  # noqa: E402
from megabyte_distill.curriculum.stage import TeacherNeed  # noqa: E402
from megabyte_distill.curriculum.stages import STAGES  # noqa: E402
from megabyte_distill.data.chunk_merging import merge_row  # noqa: E402
from megabyte_distill.data.mock import MockDataset  # noqa: E402
from megabyte_distill.data.packing import PackedRow  # noqa: E402
from megabyte_distill.model.backbone import Backbone, transformer_config  # noqa: E402
from megabyte_distill.model.student import RouterDecides, Student, set_trainable  # noqa: E402
from megabyte_distill.parallel.pipeline import built_in_stages, joined, virtual_stages  # noqa: E402
from megabyte_distill.parallel.process_groups import World, regroup, world  # noqa: E402
from megabyte_distill.runs import build_model, build_student  # noqa: E402
from megabyte_distill.training.checkpoint import load_checkpoint, load_training_state, save_checkpoint  # noqa: E402
from megabyte_distill.training.optimizer import TrainerModel, wrap_for_training  # noqa: E402
from megabyte_distill.training.step import evaluate, train_step  # noqa: E402
from tests.tiny_student import BACKBONE, BYTE_SIDE, VOCAB_SIZE, enlarged, random_rows  # noqa: E402

ROWS, UPDATES, ROW_BYTES, BUCKET = 4, 3, 48, 8
TRAINED, SAVED_AGAIN = "trained", "PP2 x VPP2"
"""Folder of a checkpoint that one rank wrote; layout that reads it and writes it again into a folder of its name."""
MARGIN = 1e-4
"""Where the router decides, p stays this far from its threshold, or rounding would decide."""


@dataclass(frozen=True)
class Layout:
    """One way to cut the ranks."""

    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1
    group: int | None = None
    """Micro-batches that a virtual stage takes at a turn."""
    sequence_parallel: bool = False
    distributed_optimizer: bool = False
    overlap: bool = False
    """Gradients are reduced during the backward pass, weights gathered during the forward pass."""
    bf16: bool = False
    cases: tuple[str, ...] | None = None
    """Those that are run; all where they are not named."""

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.bf16 else torch.float32


EVERY_STAGE = (
    "1a",
    "1b",
    "1b tied",
    "1c",
    "2a",
    "2a router, causal, exact",
    "2b",
    "2b router, causal",
    "2b frozen, mixed",
    "3a",
)
"""What layouts run beside those that run all cases."""
LAYOUTS: dict[int, dict[str, Layout]] = {
    1: {"one rank": Layout(), "one rank, bf16": Layout(bf16=True)},
    2: {
        "TP2": Layout(tensor=2),
        "PP2": Layout(pipeline=2),
        "PP2, bf16": Layout(pipeline=2, bf16=True, cases=EVERY_STAGE),
        "PP2 x VPP2": Layout(pipeline=2, virtual=2, cases=EVERY_STAGE),
        "PP2 x VPP2 in groups of 4": Layout(pipeline=2, virtual=2, group=4, cases=("1b", "2b router, causal")),
        "PP2 x VPP2, bf16": Layout(pipeline=2, virtual=2, bf16=True, cases=("1b", "2b router, causal")),
        "TP2 + SP": Layout(tensor=2, sequence_parallel=True, cases=EVERY_STAGE),
        "DP2": Layout(cases=EVERY_STAGE),
        "DP2 + distributed optimizer": Layout(distributed_optimizer=True, cases=EVERY_STAGE),
    },
    4: {
        "TP2 x PP2": Layout(tensor=2, pipeline=2, cases=EVERY_STAGE),
        "TP2 x PP2 + SP": Layout(tensor=2, pipeline=2, sequence_parallel=True),
        "TP2 x PP2 x VPP2 + SP": Layout(tensor=2, pipeline=2, virtual=2, sequence_parallel=True, cases=EVERY_STAGE),
        "PP4": Layout(pipeline=4, cases=EVERY_STAGE),
        "PP2 x DP2 + distributed optimizer": Layout(pipeline=2, distributed_optimizer=True, overlap=True),
        "PP2 x VPP2 x DP2 + distributed optimizer": Layout(
            pipeline=2,
            virtual=2,
            distributed_optimizer=True,
            overlap=True,
            cases=("1a", "1b tied", "2a", "2b router, causal"),
        ),
    },
}


@dataclass(frozen=True)
class Case:
    """A stage with some of its settings."""

    stage: str
    fields: dict[str, Any]
    mixer: ByteMixer = ByteMixer.CONV
    mode: DechunkMode = DechunkMode.HARD
    tied: bool = False
    merge_limit: float | None = None
    """What the rows' tokens are merged with."""


_ROUTER = {"boundary_source": BoundarySource.ROUTER}
CASES = {
    "1a": Case("1a", {}),
    "1a, a layer": Case("1a", {"align_layers": 1, "align_layers_loss_weight": 0.5}),
    "1b": Case("1b", {}),
    "1b tied": Case("1b", {}, tied=True),
    "1b frozen": Case("1b", {"freeze_backbone": True}, ByteMixer.MAMBA2),
    "1c": Case("1c", {}),
    "2a": Case("2a", {}, ByteMixer.MAMBA2),
    "2a router, causal, exact": Case("2a", {**_ROUTER, "byte_targets": ByteTargets.EXACT}, mode=DechunkMode.CAUSAL),
    "2a exact, its own": Case("2a", {"byte_targets": ByteTargets.EXACT, "exact_targets_from": TargetsFrom.STUDENT}),
    "2a mixed, warm": Case("2a", {"byte_targets": ByteTargets.MIXED, "kd_temperature": 2.0}),
    "2b": Case("2b", {}),
    "2b router, causal": Case("2b", _ROUTER, mode=DechunkMode.CAUSAL),
    "2b router, official": Case("2b", _ROUTER, mode=DechunkMode.OFFICIAL),
    "2b merged, mixed": Case("2b", {"byte_targets": ByteTargets.MIXED}, mode=DechunkMode.CAUSAL, merge_limit=2.5),
    "2b frozen, mixed": Case("2b", {"freeze_backbone": True, "byte_targets": ByteTargets.MIXED}),
    "3a": Case("3a", {}),
}


def cases_of(layout: Layout) -> tuple[str, ...]:
    return layout.cases or tuple(CASES)


def model_config(case: Case) -> ModelConfig:
    """Four layers, so that four pipeline stages, or two ranks' two virtual ones, have one each."""
    byte_side = replace(BYTE_SIDE, byte_mixer=case.mixer, dechunk_mode=case.mode)
    return ModelConfig(backbone=replace(BACKBONE, num_layers=4, tied_embeddings=case.tied), byte_side=byte_side)


def start_folder(start: Path, case: Case) -> Path:
    return start / f"{case.mixer.value}_{case.mode.value}_{case.tied}"


def write_starts(start: Path) -> None:
    """On one rank: a checkpoint for each kind of model among the cases."""
    for case in CASES.values():
        if not start_folder(start, case).exists():
            torch.manual_seed(5)
            student = enlarged(build_student(model_config(case)))
            save_checkpoint(start_folder(start, case), 1, student, optimizer=None, loop={}, texts={})


def _teacher(case: Case, student: nn.Module, overrides: dict[str, Any], start: Path) -> nn.Module:
    """The backbone itself where it is frozen from the start; else a copy with other weights, of 1a the beginning."""
    layers = case.fields.get("align_layers")
    if (case.stage == "1a" and not layers) or case.fields.get("freeze_backbone"):
        return joined([part.backbone for part in virtual_stages(student)])
    config = model_config(case).backbone
    fields = transformer_config(config, **overrides)
    holders = built_in_stages(lambda number: TeacherHolder(Backbone(config, fields, vp_stage=number)))
    folder = start_folder(start, case) / "iter_0000001"
    if layers:
        load_first_layers(folder, holders, layers, dtype=torch.float32)
    else:
        load_checkpoint(folder, holders, prefix="backbone.")
    with torch.no_grad():
        for parameter in holders.parameters():
            parameter.mul_(1.25)
    holders.requires_grad_(False).to(overrides["pipeline_dtype"])
    return joined([holder.backbone for holder in virtual_stages(holders)])


def _margin(student: Student, rows: list[PackedRow]) -> float:
    """How near p comes to the threshold. On one rank."""
    with torch.no_grad():
        return min(float((student(row, RouterDecides()).p - 0.5).abs().min()) for row in rows)


def _mine(rows: list[PackedRow], here: World) -> list[PackedRow]:
    return rows[here.data_parallel_rank :: here.data_parallel_size]


def run_case(case: Case, layout: Layout, here: World, start: Path) -> dict[str, Any]:
    """Three updates; the same on every rank but for what each knows of its own weights."""
    overrides = {
        "sequence_parallel": layout.sequence_parallel,
        "pipeline_dtype": layout.dtype,
        "microbatch_group_size_per_vp_stage": layout.group,
    }
    student = build_model(model_config(case), overrides=overrides)
    parts = virtual_stages(student)
    load_checkpoint(start_folder(start, case) / "iter_0000001", student)
    student.to(layout.dtype)
    stage, config = STAGES[case.stage], StageConfig(lr=1e-3, global_batch_size=ROWS, **case.fields)
    for part in parts:
        set_trainable(part, stage.trains(config, model_config(case).backbone))
    needs = stage.teacher(config) is not TeacherNeed.NONE
    teacher = _teacher(case, student, overrides, start) if needs else None
    objective = stage.objective(config, teacher, MockDataset(VOCAB_SIZE, seed=0).table)
    trained = wrap_for_training(
        student,
        parts[0].config,
        config,
        bf16=layout.bf16,
        use_distributed_optimizer=layout.distributed_optimizer,
        overlap_grad_reduce=layout.overlap,
        overlap_param_gather=layout.overlap,
        ddp_bucket_size=1000 if layout.overlap else None,  # several buckets, of which some end within a layer
    )
    student.train()
    frozen = {name: p.detach().clone() for name, p in student.named_parameters() if not p.requires_grad}
    sizes = {"row_bytes": ROW_BYTES, "bucket": BUCKET, "seed": 13}
    rows = random_rows(ROWS * UPDATES, marked=stage.reads_loss_mask, **sizes)
    rows = [merge_row(row, case.merge_limit) for row in rows]
    result: dict[str, Any] = {"losses": [], "grad_norms": [], "margin": 1.0}
    is_decided = here.size == 1 and case.fields.get("boundary_source") is BoundarySource.ROUTER
    for update in range(UPDATES):
        batch = rows[update * ROWS : (update + 1) * ROWS]
        if is_decided:
            result["margin"] = min(result["margin"], _margin(parts[0], batch))
        report = train_step(trained, objective, _mine(batch, here), update, here)
        result["losses"].append({name: total / count for name, (total, count) in report.sums.items()})
        result["grad_norms"].append(report.grad_norm)
    trained.gather_parameters()
    held_out = evaluate(student, objective, [_mine(rows[:ROWS], here)], here)
    result["held out"] = {name: total / count for name, (total, count) in held_out.items()}
    now = dict(student.named_parameters())
    result["changed"] = [name for name, before in frozen.items() if not torch.equal(before, now[name])]
    return result


def _of_all_ranks(result: dict[str, Any], here: World) -> dict[str, Any]:
    """The main rank's figures, and the frozen parameters that changed anywhere."""
    changed: list[list[str]] = [[] for _ in range(here.size)]
    dist.all_gather_object(changed, result["changed"])
    return {**result, "changed": sorted({name for names in changed for name in names})}


def trained_once(here: World, seed: int) -> TrainerModel:
    """2b after an update on random rows."""
    case = CASES["2b"]
    torch.manual_seed(5)
    model = build_model(model_config(case))
    parts = virtual_stages(model)
    stage, config = STAGES[case.stage], StageConfig(lr=1e-3, global_batch_size=ROWS, **case.fields)
    for part in parts:
        set_trainable(part, stage.trains(config, model_config(case).backbone))
    trained = wrap_for_training(model, parts[0].config, config)
    rows = random_rows(ROWS, row_bytes=ROW_BYTES, bucket=BUCKET, seed=seed)
    train_step(trained, stage.objective(config, None, None), rows, 0, here)
    return trained


def write_trained(folder: Path, here: World) -> None:
    """A checkpoint of weights and optimizer after an update."""
    trained = trained_once(here, seed=13)
    save_checkpoint(folder, 1, trained.module, optimizer=trained, loop={}, texts={})


def save_again(folder: Path, target: Path, here: World) -> None:
    """What :func:`write_trained` wrote, read and written at another cut."""
    trained = trained_once(here, seed=14)  # other weights and moments, all to be overwritten
    checkpoint = folder / "iter_0000001"
    load_checkpoint(checkpoint, trained.module)
    load_training_state(checkpoint, trained.module, trained, with_rng=False)
    save_checkpoint(target, 1, trained.module, optimizer=trained, loop={}, texts={})


def run_all(start: Path) -> dict[str, dict[str, Any]]:
    """By layout and case."""
    results: dict[str, dict[str, Any]] = {}
    for name, layout in LAYOUTS[dist.get_world_size()].items():
        here = regroup(tensor_parallel=layout.tensor, pipeline_parallel=layout.pipeline, virtual_stages=layout.virtual)
        results[name] = {
            title: _of_all_ranks(run_case(case, layout, here, start), here)
            for title, case in CASES.items()
            if title in cases_of(layout)
        }
        if name == SAVED_AGAIN:
            save_again(start / TRAINED, start / name, here)
    return results


if __name__ == "__main__":
    with world():
        figures = run_all(Path(sys.argv[1]))
        if dist.get_rank() == 0:
            Path(sys.argv[2]).write_text(json.dumps(figures, indent=1))
