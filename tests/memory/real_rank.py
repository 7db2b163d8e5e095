"""One rank that really builds and runs a stage of the curriculum, and what its tensors take: JSON on each rank's line.

torchrun --nproc-per-node 4 tests/memory/real_rank.py FLAGS…
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from megabyte_distill.config import Settings, parse_arguments
from megabyte_distill.conversion.model_config import ModelConfig
from megabyte_distill.curriculum.stage import Stage, TeacherNeed
from megabyte_distill.curriculum.stages import STAGES, resolved_stages
from megabyte_distill.memory.even_rows import even_row, even_tokens
from megabyte_distill.memory.planned_stages import planned_stages
from megabyte_distill.model.backbone import Backbone, transformer_config
from megabyte_distill.model.byte_stack import recompute_byte_mixers
from megabyte_distill.model.student import set_trainable
from megabyte_distill.parallel.pipeline import built_in_stages, joined, set_virtual_size, virtual_stages
from megabyte_distill.parallel.process_groups import torchrun_environment, world
from megabyte_distill.runs import backbone_overrides, build_model, training_dtype
from megabyte_distill.training.optimizer import TrainerModel, wrap_for_training
from megabyte_distill.training.step import train_step
from tests.tiny_student import BACKBONE as TINY

BACKBONE = replace(TINY, num_layers=4)  # so that two ranks can have two virtual stages each
VIRTUAL = (1, 2)
"""Virtual stages of each rank of a pipeline, one after the other."""
BYTES_PER_CHUNK = 3.0
# rows shorter than 64 bytes: the convolution takes the path that a GPU takes
SMALL = (
    *("--mock-data", "--seq-length", "60", "--micro-batch-size", "4", "--global-batch-size", "16"),
    *("--chunk-bucket", "8", "--byte-width", "24", "--encoder-layers", "1", "--decoder-layers", "2"),
    *("--encoder-ffn-hidden-size", "32", "--decoder-ffn-hidden-size", "40", "--router-hidden-size", "48"),
    *("--byte-mixer", "mamba2", "--mamba-state-dim", "8", "--mamba-head-dim", "12", "--mamba-scan-chunk", "16"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RealSizes:
    """Bytes, as in RankMemory."""

    pipeline_rank: int
    data_parallel_rank: int
    weights: int
    teacher: int
    gradients: int
    optimizer: int
    sent: int
    """The largest payload that went to the next pipeline stage."""
    returned: int
    """The largest gradient that went to the stage before."""


@contextmanager
def watched_pipeline() -> Iterator[dict[str, int]]:
    """What megatron's communicator is given to send: the most bytes at once, by direction."""
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

    most = {"tensor_send_next": 0, "tensor_send_prev": 0}
    real = P2PCommunicator._communicate

    def communicate(self: Any, **tensors: Any) -> Any:
        for name in most:
            if tensors[name] is not None:
                most[name] = max(most[name], tensors[name].nbytes)
        return real(self, **tensors)

    P2PCommunicator._communicate = communicate
    try:
        yield most
    finally:
        P2PCommunicator._communicate = real


def bytes_of(tensors: Sequence[Tensor]) -> int:
    """Of distinct storages."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def real_models(settings: Settings, stage: Stage) -> tuple[nn.Module, nn.Module | None, nn.Module | None]:
    """This rank's part of the student, its teacher if any, and the same teacher where it is a copy of its own."""
    config = resolved_stages(settings.stages)[stage.name]
    overrides, dtype = backbone_overrides(settings, config), training_dtype(settings)
    byte_side = settings.model.byte_side_for(BACKBONE.hidden_size)
    student = build_model(ModelConfig(backbone=BACKBONE, byte_side=byte_side), overrides=overrides).to(dtype)
    if config.recompute_byte_mixers:
        recompute_byte_mixers(student)
    parts = virtual_stages(student)
    for part in parts:
        set_trainable(part, stage.trains(config, BACKBONE))
    if stage.teacher(config) is TeacherNeed.NONE:
        return student, None, None
    if next(one.shares_teacher for one in planned_stages(settings, BACKBONE) if one.name == stage.name):
        return student, joined([part.backbone for part in parts]), None
    fields = transformer_config(BACKBONE, **overrides)
    teacher = built_in_stages(lambda number: Backbone(BACKBONE, fields, vp_stage=number)).to(dtype)
    teacher.requires_grad_(False).eval()
    return student, teacher, teacher


def optimizer_bytes(trained: TrainerModel) -> int:
    """What the optimizer holds after an update, scalars left out; a weight that is trained directly is no master."""
    own = {parameter.untyped_storage().data_ptr() for parameter in trained.module.parameters()}
    held: list[Tensor] = []
    for part in getattr(trained.optimizer, "chained_optimizers", [trained.optimizer]):
        inner = part.optimizer
        for group in inner.param_groups:
            held += [p for p in group["params"] if p.untyped_storage().data_ptr() not in own]
        held += [value for state in inner.state.values() for value in state.values() if value.dim()]
    return bytes_of(held)


def real_sizes(settings: Settings, stage_name: str) -> RealSizes:
    """Build, make one update, count."""
    from megatron.core import parallel_state

    from megabyte_distill.parallel.process_groups import current_world

    stage, config, ranks = STAGES[stage_name], resolved_stages(settings.stages)[stage_name], current_world()
    student, teacher, own_teacher = real_models(settings, stage)
    trained = wrap_for_training(
        student,
        virtual_stages(student)[0].config,
        config,
        bf16=settings.run.bf16,
        use_distributed_optimizer=settings.parallel.use_distributed_optimizer,
    )
    table = even_tokens(BACKBONE.vocab_size) if stage_name.startswith("2") else None
    objective = stage.objective(config, teacher, table)
    rows = [even_row(config, BYTES_PER_CHUNK)] * config.micro_batches(ranks.data_parallel_size)
    with watched_pipeline() as most:
        train_step(trained, objective, rows, 0, ranks)
    return RealSizes(
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        data_parallel_rank=ranks.data_parallel_rank,
        weights=bytes_of([*student.parameters()]),
        teacher=bytes_of([*own_teacher.parameters()]) if own_teacher is not None else 0,
        gradients=sum(buffer.grad_data.nbytes for part in trained.parts for buffer in part.buffers),
        optimizer=optimizer_bytes(trained),
        sent=most["tensor_send_next"],
        returned=most["tensor_send_prev"],
    )


def main(argv: Sequence[str]) -> None:
    """Print this rank's sizes, one line a stage."""
    settings = parse_arguments([*SMALL, *argv], world_size=torchrun_environment()[1])
    parallel = settings.parallel
    torch.set_num_threads(1)
    with world(
        tensor_parallel=parallel.tensor_model_parallel_size, pipeline_parallel=parallel.pipeline_model_parallel_size
    ) as ranks:
        for virtual in VIRTUAL[: 1 if parallel.pipeline_model_parallel_size == 1 else None]:
            set_virtual_size(virtual)
            for stage in settings.stages:
                place = {"rank": ranks.rank, "stage": stage, "virtual": virtual}
                print(f"\nsizes {json.dumps({**place, **asdict(real_sizes(settings, stage))})}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
