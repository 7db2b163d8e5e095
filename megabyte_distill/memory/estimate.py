"""What each pipeline stage's ranks hold in each stage of the curriculum, from modules that are really built.

A rank is pretended, its student, teacher, DDP and optimizer are built without memory, and one micro-batch goes
forward and backward through them; every number is the size of a tensor that training would make.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from megabyte_distill.config import Settings, StageConfig
from megabyte_distill.config.engine import EngineConfig
from megabyte_distill.config.model import BackboneConfig
from megabyte_distill.config.stage import ByteTargets
from megabyte_distill.conversion.model_config import ModelConfig
from megabyte_distill.conversion.parallel_sizes import check_parallel_sizes
from megabyte_distill.curriculum.stage import Stage, TeacherNeed
from megabyte_distill.curriculum.stages import STAGES
from megabyte_distill.data.packing import PackedRow
from megabyte_distill.memory.even_rows import even_row, even_tokens
from megabyte_distill.memory.in_flight import worst_moment
from megabyte_distill.memory.live_bytes import LiveBytes
from megabyte_distill.memory.planned_stages import PlannedStage, planned_stages
from megabyte_distill.memory.pretended import WithoutValues, fused_attention, pretended_world, weightless
from megabyte_distill.model.backbone import Backbone, transformer_config
from megabyte_distill.model.byte_stack import recompute_byte_mixers
from megabyte_distill.model.student import Student, set_trainable
from megabyte_distill.objectives.objective import Objective
from megabyte_distill.parallel.pipeline import built_in_stages, joined, virtual_size, virtual_stages
from megabyte_distill.runs import backbone_overrides, build_model, training_dtype
from megabyte_distill.training.optimizer import TrainerModel, wrap_for_training
from megabyte_distill.training.step import stage_link, stage_output

MOMENTS = 2
"""AdamW keeps that many fp32 numbers of each trained parameter, beside its fp32 master under bf16."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VirtualStageMemory:
    """Bytes that micro-batches take on one virtual stage of a rank; without virtual stages there is one."""

    kept: int
    """What one micro-batch keeps for its backward pass."""
    in_flight: int
    """Micro-batches whose forward has begun and whose backward is not done, where the rank's take most."""
    peak: int
    """The most that one micro-batch's forward and backward have alive at once."""
    sent: int
    """Bytes that one micro-batch sends to the next pipeline stage; 0 on the last."""
    returned: int
    """Bytes of the gradient that one micro-batch sends to the stage before; 0 on the first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankMemory:
    """Bytes on a rank of one pipeline stage in one stage of the curriculum."""

    stage: str
    pipeline_rank: int
    parameters: int
    """Numbers, not bytes: the student's on this rank."""
    trained: int
    """Numbers that this stage trains."""
    weights: int
    """The student's."""
    teacher: int
    """A frozen copy beside it; 0 where there is none or the student's own backbone serves."""
    gradients: int
    optimizer: int
    """Masters and moments."""
    activations: int
    """Bytes of the micro-batches in flight, one of them at its worst moment."""
    virtual_stages: tuple[VirtualStageMemory, ...]

    @property
    def total(self) -> int:
        """All of it. What an allocator wastes, NCCL's buffers and CUDA's own gigabyte or so come on top."""
        return self.weights + self.teacher + self.gradients + self.optimizer + self.activations


def estimate(
    settings: Settings, backbone: BackboneConfig, *, world_size: int, bytes_per_chunk: float = 4.4
) -> Iterator[RankMemory]:
    """One entry a selected stage and pipeline rank, for a job of ``world_size`` ranks on rows of even chunks.

    Layers of Transformer Engine are counted as megatron-core's own, which have the same weights. ValueError where sizes
    do not fit together, as training would say. Needs a process without process groups.
    """
    planned = planned_stages(settings, backbone)
    settings = replace(settings, engine=EngineConfig())
    check_parallel_sizes(
        backbone,
        tensor_parallel=settings.parallel.tensor_model_parallel_size,
        pipeline_parallel=settings.parallel.pipeline_model_parallel_size,
        virtual_stages=settings.parallel.num_virtual_stages_per_pipeline_rank,
        layers_per_virtual_stage=settings.parallel.num_layers_per_virtual_pipeline_stage,
        align_layers=settings.align_layers,
    )
    for one in planned:
        yield from _stage_memory(settings, backbone, one, world_size, bytes_per_chunk)


def _stage_memory(
    settings: Settings, backbone: BackboneConfig, planned: PlannedStage, world_size: int, bytes_per_chunk: float
) -> Iterator[RankMemory]:
    """Pipeline rank after pipeline rank; what the first stage sends is as large as what any other receives."""
    stage, config, parallel = STAGES[planned.name], planned.config, settings.parallel
    tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    data = parallel.data_parallel_size(world_size)
    virtual = parallel.virtual_stages(backbone.num_layers)
    payload: Tensor | None = None
    first_trains = False
    for place in range(pipeline):
        with pretended_world(
            rank=place * tensor * data, tensor_parallel=tensor, pipeline_parallel=pipeline, virtual_stages=virtual,
            data_parallel=data,
        ):  # fmt: skip
            built = _build(settings, backbone, stage, config, shares_teacher=planned.shares_teacher)
            parts = virtual_stages(built.student)
            # every stage has layers, and what is no layer and trains before another stage is on the first
            first_trains = first_trains or (place == 0 and any(p.requires_grad for p in parts[0].parameters()))
            runs = []
            for part in parts:
                arrives = [first_trains and not part.pre_process] * virtual
                arriving = None if part.pre_process else payload
                runs.append(_run_micro_batch(built, part, stage, config, arriving, arrives, bytes_per_chunk))
                payload = runs[-1].sent if payload is None else payload
            worst = worst_moment(
                [run.kept for run in runs], [run.peak for run in runs], config.micro_batches(data),
                parallel.micro_batch_group,
            )  # fmt: skip
            gradients, optimizer = (0, 0) if built.trained is None else training_bytes(built.trained)
            yield RankMemory(
                stage=stage.name,
                pipeline_rank=place,
                parameters=sum(parameter.numel() for parameter in built.student.parameters()),
                trained=sum(parameter.numel() for parameter in built.student.parameters() if parameter.requires_grad),
                weights=_bytes_of(_storages(built.student.parameters())),
                teacher=_bytes_of(_storages(built.own_teacher.parameters())) if built.own_teacher else 0,
                gradients=gradients,
                optimizer=optimizer,
                activations=worst.size,
                virtual_stages=tuple(
                    VirtualStageMemory(
                        kept=run.kept,
                        in_flight=in_flight,
                        peak=run.peak,
                        sent=0 if run.sent is None else run.sent.nbytes,
                        returned=run.returned,
                    )
                    for run, in_flight in zip(runs, worst.in_flight, strict=True)
                ),
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Built:
    """One rank's part of everything that training builds."""

    student: nn.Module
    teacher: nn.Module | None
    own_teacher: nn.Module | None
    """The same, where it is not the student's backbone."""
    trained: TrainerModel | None
    """None where nothing of this rank trains."""


def _build(
    settings: Settings, backbone: BackboneConfig, stage: Stage, config: StageConfig, *, shares_teacher: bool
) -> _Built:
    overrides = {**backbone_overrides(settings, config), "perform_initialization": False}
    byte_side = settings.model.byte_side_for(backbone.hidden_size)
    dtype = training_dtype(settings)
    own_teacher: nn.Module | None = None
    with weightless():
        student = build_model(ModelConfig(backbone=backbone, byte_side=byte_side), overrides=overrides).to(dtype)
        if config.recompute_byte_mixers:
            recompute_byte_mixers(student)
        parts = virtual_stages(student)
        for part in parts:
            set_trainable(part, stage.trains(config, backbone))
        need = stage.teacher(config)
        if need is not TeacherNeed.NONE and not shares_teacher:
            fields = transformer_config(backbone, **overrides)
            own_teacher = built_in_stages(lambda number: Backbone(backbone, fields, vp_stage=number)).to(dtype)
            is_beginning = need is TeacherNeed.BEGINNING
            for part in virtual_stages(own_teacher) if is_beginning else ():
                part.drop_behind(config.align_layers)
            # as training has it: layers through which a gradient passes may be computed again
            own_teacher.requires_grad_(False).train(is_beginning)
        trained: TrainerModel | None = None
        if any(parameter.requires_grad for parameter in student.parameters()):
            trained = wrap_for_training(
                student,
                parts[0].config,
                config,
                bf16=settings.run.bf16,
                use_distributed_optimizer=settings.parallel.use_distributed_optimizer,
                overlap_grad_reduce=settings.parallel.overlap_grad_reduce,
                ddp_bucket_size=settings.parallel.ddp_bucket_size,
                use_gloo_process_groups=False,
            )
    teacher = own_teacher
    if own_teacher is None and need is not TeacherNeed.NONE:
        teacher = joined([part.backbone for part in parts])
    return _Built(student=student, teacher=teacher, own_teacher=own_teacher, trained=trained)


def training_bytes(trained: TrainerModel) -> tuple[int, int]:
    """(bytes of gradients, bytes of the optimizer's masters and moments) on this rank; scalars are left out."""
    gradients = sum(buffer.grad_data.untyped_storage().nbytes() for part in trained.parts for buffer in part.buffers)
    held = [parameter for group in trained.optimizer.param_groups for parameter in group["params"]]
    weights = _storages(trained.module.parameters())
    masters = {key: storage for key, storage in _storages(held).items() if key not in weights}
    moments = MOMENTS * torch.float32.itemsize * sum(parameter.numel() for parameter in held)
    return gradients, _bytes_of(masters) + moments


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What one micro-batch takes on one rank."""

    kept: int
    peak: int
    sent: Tensor | None
    """Its payload, None on the last pipeline stage."""
    returned: int
    """Bytes of the gradient for the stage before."""


def _run_micro_batch(
    built: _Built,
    part: Student,
    stage: Stage,
    config: StageConfig,
    arriving: Tensor | None,
    gradient_arrives: Sequence[bool],
    bytes_per_chunk: float,
) -> MicroBatch:
    row = even_row(config, bytes_per_chunk)
    needs_table = config.byte_targets is not ByteTargets.HARD
    table = even_tokens(part.backbone.backbone_config.vocab_size) if needs_table else None  # type: ignore[union-attr]
    with WithoutValues(), fused_attention():  # type: ignore[no-untyped-call]
        objective = stage.objective(config, built.teacher, table)
        with ExitStack() as stack:
            for wrapped in () if built.trained is None else built.trained.parts:
                stack.enter_context(wrapped.no_sync())
            return measured(part.train(), objective, row, arriving=arriving, gradient_arrives=gradient_arrives)


def measured(
    student: Student,
    objective: Objective,
    row: PackedRow,
    *,
    arriving: Tensor | None = None,
    gradient_arrives: Sequence[bool] = (False,),
) -> MicroBatch:
    """One micro-batch forward and backward through a part of this rank's, gradients given up as soon as they are there.

    ``arriving``: of the size that the pipeline stage before sends; ``gradient_arrives``: as in ``run_schedule``. Any
    device; needs process groups, also pretended.
    """
    # megatron's DDP adds each gradient to its buffer and drops it; where there is none it is dropped all the same
    handles = [
        parameter.register_post_accumulate_grad_hook(_drop_gradient)  # type: ignore[no-untyped-call]
        for parameter in student.parameters()
        if parameter.requires_grad and not hasattr(parameter, "main_grad")
    ]
    with LiveBytes() as live:
        received = None if arriving is None else torch.empty_like(arriving).requires_grad_()
        student.set_input_tensor(received)
        link = stage_link(student, gradient_arrives)
        out = stage_output(student, objective, row, link, lambda losses: torch.stack([*losses.values()]).sum())
        assert out is not None
        # what was sent on is freed by megatron's schedule, but not by the interleaved one
        kept = live.now - (0 if link.is_last or virtual_size() > 1 else out.nbytes)
        if out.requires_grad:
            torch.autograd.backward(out, None if link.is_last else torch.empty_like(out))
    for handle in handles:
        handle.remove()
    returned = 0 if received is None or received.grad is None else received.grad.nbytes
    return MicroBatch(kept, live.peak, None if link.is_last else out.detach(), returned)


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _storages(tensors: Iterable[Tensor]) -> dict[int, torch.UntypedStorage]:
    """Distinct storages: DDP makes many parameters views of one buffer."""
    return {storage._cdata: storage for tensor in tensors for storage in [tensor.untyped_storage()]}


def _bytes_of(storages: dict[int, torch.UntypedStorage]) -> int:
    return sum(storage.nbytes() for storage in storages.values())
