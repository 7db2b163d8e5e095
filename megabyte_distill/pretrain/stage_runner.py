"""One stage: build the student, give it its weights, its teacher, its rows, and run the loop."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from megabyte_distill.config import STAGE_ORDER, Settings, StageConfig
from megabyte_distill.config.run_config import RUN_CONFIG_NAME, diff, read_run_config, run_config_text
from megabyte_distill.config.stage import MERGES_IN, OF_DIALOGUES, ByteTargets, runs_backbone
from megabyte_distill.conversion.teacher_folder import BACKBONE_PREFIX, load_teacher_stages
from megabyte_distill.curriculum.stage import Stage, TeacherNeed
from megabyte_distill.curriculum.stages import STAGES, resolved_stages
from megabyte_distill.data.chunk_merging import ChunkLimits, ChunkSchedule, ChunkSizes, SameLimit
from megabyte_distill.model.byte_stack import recompute_byte_mixers
from megabyte_distill.model.student import set_trainable
from megabyte_distill.objectives.objective import Objective
from megabyte_distill.parallel.pipeline import joined, virtual_stages
from megabyte_distill.parallel.positions import Position
from megabyte_distill.parallel.process_groups import World
from megabyte_distill.pretrain.prepare import STARTED_FROM, Prepared, asked_start, started_from, starting_point
from megabyte_distill.pretrain.run_data import RunData, stored_targets
from megabyte_distill.runs import (
    KEEPS_BACKBONE,
    KeptBackbone,
    StageProgress,
    backbone_overrides,
    build_model,
    chunk_limit,
    complete_stages,
    kept_backbone,
    stage_progress,
    training_dtype,
)
from megabyte_distill.training.checkpoint import load_checkpoint, read_loop_state
from megabyte_distill.training.invariants import Invariants
from megabyte_distill.training.logging import MetricWriter, say
from megabyte_distill.training.loop import Loop, StopReason
from megabyte_distill.training.optimizer import wrap_for_training
from megabyte_distill.training.rows import HeldOutRows, MicroBatches
from megabyte_distill.training.saving import Saver
from megabyte_distill.training.signals import StopRequest
from megabyte_distill.training.stages_agree import StagesAgree


@dataclass(frozen=True, slots=True, kw_only=True)
class StageRunner:
    """Runs stages of one run, each from its starting point or from where it was left."""

    settings: Settings
    prepared: Prepared
    data: RunData
    world: World
    writer: MetricWriter
    stop: StopRequest
    position: Position
    deadline: float = math.inf

    def run(self, name: str) -> StopReason:
        """Train a stage to its end (or until somebody stops it); its checkpoints lie in RUN/<stage>."""
        stage, config = STAGES[name], self._config(name)
        progress = stage_progress(self.prepared.root, name)
        if progress is not None:
            self._check_parent(progress)
        if progress is not None and progress.is_complete and progress.iteration >= config.train_iters:
            self._say(f" stage {name} ({stage.title}) is complete at iteration {progress.iteration}: skipped")
            return StopReason.DONE
        if progress is not None and not progress.is_complete and progress.iteration >= config.train_iters:
            raise ValueError(
                f"stage {name} was left at iteration {progress.iteration} of {progress.train_iters}, and --train-iters "
                f"{config.train_iters} is not beyond it; give --{name}.train-iters more than that, or remove "
                f"{self.prepared.root / name} to train the stage anew"
            )
        self.position.begin(name, 0, "load")
        keeps_backbone = self._keeps_backbone(stage, config, progress)
        shares_teacher = keeps_backbone and self.settings.engine.serves_twice
        self._say_targets(stage, config, shares_teacher=shares_teacher)
        if runs_backbone(name, config) and (trouble := self.data.beyond_context(config)) is not None:
            self._say(f" warning: stage {name}: {trouble}")
        student, teacher = self._models(stage, config, progress, shares_teacher=shares_teacher)
        sizes = self._chunk_sizes(name, config, progress)
        identity = self._identity(name, progress, keeps_backbone=keeps_backbone)
        loop = self._loop(stage, config, student, teacher, sizes, identity)
        if progress is not None:
            checkpoint = self.settings.checkpoint
            loop.resume(
                progress.checkpoint,
                with_optimizer=not checkpoint.no_load_optim,
                with_rng=not checkpoint.no_load_rng,
            )
            self._say(f" stage {name} goes on from {progress.checkpoint}")
            for line in self._changes(progress.checkpoint, name):
                self._say(f" warning: changed since that checkpoint: {line}")
        return loop.run()

    def _config(self, name: str) -> StageConfig:
        """The stage's settings, decided where they depend on what its weights have been through."""
        given = self.settings.stages[name]
        behind = complete_stages(self.prepared.source) if self.prepared.source is not None else []
        behind += complete_stages(self.prepared.root, before=name)
        return resolved_stages({name: given}, [progress.stage for progress in behind])[name]

    def _say_targets(self, stage: Stage, config: StageConfig, *, shares_teacher: bool) -> None:
        if config.byte_targets is ByteTargets.HARD or config.logits_load_dir is not None:
            return
        if stage.teacher(config) is TeacherNeed.NONE:
            whose = "the student's own backbone makes the exact targets"
        elif shares_teacher:
            whose = "the teacher makes the exact targets; the student's backbone is still the same and serves as it"
        else:
            whose = "the teacher makes the exact targets; a copy of it is loaded beside the student"
        self._say(f" stage {stage.name}: {whose}")

    def _keeps_backbone(self, stage: Stage, config: StageConfig, own: StageProgress | None) -> bool:
        """Whether the student's backbone is the teacher's until the stage ends: one copy of the weights serves both."""
        if not stage.keeps_backbone(config, self.prepared.model_config.backbone):
            return False
        checkpoint, what = self._weights_of(stage.name, own)
        if what == "teacher":
            return True
        kept = kept_backbone(checkpoint)
        return kept is not None and kept == self._teachers_backbone()

    def _weights_of(self, name: str, own: StageProgress | None) -> tuple[Path, str]:
        """(checkpoint, name of what it holds) with which the stage begins here: its own where it goes on."""
        return (own.checkpoint, f"stage {name}") if own is not None else starting_point(self.prepared, name)

    def _teachers_backbone(self) -> KeptBackbone | None:
        """What a checkpoint of this run says whose backbone is the teacher's; None where nobody knows which that is."""
        teacher = self.prepared.teacher_identity
        return None if teacher is None else KeptBackbone(teacher=teacher, bf16=self.settings.run.bf16)

    def _check_parent(self, progress: StageProgress) -> None:
        """ValueError where the stage this one was built on has been trained further since."""
        parent = read_loop_state(progress.checkpoint).get("parent") or {}
        now = stage_progress(self.prepared.root, parent["stage"]) if parent else None
        if now is not None and now.iteration != parent["iteration"]:
            raise ValueError(
                f"stage {progress.stage} was built on {now.stage} at iteration {parent['iteration']}, which is at "
                f"{now.iteration} now; remove {self.prepared.root / progress.stage} to build it anew, or give another "
                "--save"
            )

    def _changes(self, checkpoint: Path, name: str) -> list[str]:
        """What this stage's settings are now that they were not when the checkpoint was written."""
        before = read_run_config(checkpoint / RUN_CONFIG_NAME)
        if name not in before.stages:
            return []
        only = {name: before.stages[name]}, {name: self.settings.stages[name]}
        lines = diff(replace(before, stages=only[0]), replace(self.settings, stages=only[1]))
        # where and how long a run goes changes nothing of what it learns
        return [line for line in lines if not line.startswith(("run.", "checkpoint.", "parallel."))]

    def _say(self, text: str) -> None:
        if self.world.is_main:
            say(text)

    def _models(
        self, stage: Stage, config: StageConfig, own: StageProgress | None, *, shares_teacher: bool
    ) -> tuple[nn.Module, nn.Module | None]:
        dtype = training_dtype(self.settings)
        verify = self.settings.checkpoint.verify_checkpoint
        # every run of a stage draws the same fresh weights for the parts no checkpoint holds yet
        torch.manual_seed(self.settings.run.seed)
        overrides = backbone_overrides(self.settings, config)
        student = build_model(self.prepared.model_config, overrides=overrides)
        if own is not None:
            # before the objective and the optimizer are made: both look at the weights
            load_checkpoint(own.checkpoint, student, verify=verify)
        else:
            checkpoint, what = starting_point(self.prepared, stage.name)
            load_checkpoint(checkpoint, student, prefix=BACKBONE_PREFIX if what == "teacher" else "", verify=verify)
            self._say(f" stage {stage.name} ({stage.title}) starts from {what}: {checkpoint}")
        student.to(device=self.world.device, dtype=dtype)
        if config.recompute_byte_mixers:
            recompute_byte_mixers(student)
        parts = virtual_stages(student)
        for part in parts:
            set_trainable(part, stage.trains(config, self.prepared.model_config.backbone))
        teacher: nn.Module | None = None
        need = stage.teacher(config)
        if need is not TeacherNeed.NONE and shares_teacher:
            teacher = joined([part.backbone for part in parts])
        elif need is not TeacherNeed.NONE:
            first_layers = config.align_layers if need is TeacherNeed.BEGINNING else None
            teacher = load_teacher_stages(
                self.prepared.teacher, dtype=dtype, overrides=overrides, verify=verify, first_layers=first_layers
            )
            # layers through which a gradient passes may have to be computed again, which megatron's do in training mode
            teacher.requires_grad_(False).train(first_layers is not None)
        return student, teacher

    def _loop(
        self,
        stage: Stage,
        config: StageConfig,
        student: nn.Module,
        teacher: nn.Module | None,
        sizes: ChunkLimits | None,
        identity: Mapping[str, Any],
    ) -> Loop:
        settings, world = self.settings, self.world
        train, valid = self.data.row_streams(stage.name, config)
        has_losses = any(part.post_process for part in virtual_stages(student))
        stored = stored_targets(settings, config, self.prepared, train, has_losses=has_losses)
        evaluates, mask = config.eval_iters > 0, settings.model.document_mask
        objective = stage.objective(config, teacher, self.prepared.token_bytes)
        return Loop(
            stage=stage.name,
            trained=wrap_for_training(
                student,
                virtual_stages(student)[0].config,
                config,
                bf16=settings.run.bf16,
                use_distributed_optimizer=settings.parallel.use_distributed_optimizer,
                overlap_grad_reduce=settings.parallel.overlap_grad_reduce,
                overlap_param_gather=settings.parallel.overlap_param_gather,
                ddp_bucket_size=settings.parallel.ddp_bucket_size,
                position=self.position,
            ),
            objective=objective,
            rows=MicroBatches(train, config, world, document_mask=mask, stored_targets=stored, chunk_sizes=sizes),
            config=config,
            run_config=settings.run,
            world=world,
            saver=Saver(
                folder=self.prepared.root / stage.name,
                world=world,
                background=settings.checkpoint.async_save,
                keep_last_checkpoints=settings.checkpoint.keep_last_checkpoints,
                save_retain_interval=settings.checkpoint.save_retain_interval,
                texts={RUN_CONFIG_NAME: run_config_text(settings)},
            ),
            writer=self.writer,
            stop=self.stop,
            deadline=self.deadline,
            extra_state=identity,
            valid_rows=HeldOutRows(valid if evaluates else None, config, world, document_mask=mask, chunk_sizes=sizes),
            invariants=self._invariants(student, objective) if settings.run.check_invariants else None,
        )

    def _chunk_sizes(self, name: str, config: StageConfig, own: StageProgress | None) -> ChunkLimits | None:
        """How chunks grow in a stage: the same length is the same limit in all of them, and in a resumed run."""
        if config.target_bytes_per_chunk is None and name in OF_DIALOGUES:
            return self._limit_before(name, own)
        if config.target_bytes_per_chunk is None or name not in MERGES_IN:
            return None
        schedule = ChunkSchedule(config, ChunkSizes(self.data.chunk_sample()))
        last = schedule.limit(config.train_iters)
        reached = schedule.sizes.mean(1.0 if last is None else last)
        self._say(
            f" stage {name} merges tokens of {schedule.sizes.mean(1.0):.2f} bytes to chunks of {reached:.2f} "
            f"(--target-bytes-per-chunk {config.target_bytes_per_chunk})"
        )
        return schedule

    def _limit_before(self, name: str, own: StageProgress | None) -> SameLimit | None:
        """What the stage this one builds on merged tokens with at its end, which it goes on with."""
        checkpoint, what = self._weights_of(name, own)
        limit = None if what == "teacher" else chunk_limit(checkpoint)
        if limit is None:
            return None
        self._say(f" stage {name} merges tokens as the stage before it did")
        return SameLimit(limit)

    def _invariants(self, student: nn.Module, objective: Objective) -> Invariants:
        # where the losses are complete on the first stage, the others see no rows
        further = [] if objective.on_first_stage else [StagesAgree(student)]
        return Invariants(student, self.world, further)

    def _identity(self, name: str, own: StageProgress | None, *, keeps_backbone: bool) -> dict[str, Any]:
        """What each checkpoint says of its origin: tokenizer, backbone, and the stage and the run it was built on."""
        before = [stage_progress(self.prepared.root, stage) for stage in STAGE_ORDER[: STAGE_ORDER.index(name)]]
        parents = [progress for progress in before if progress is not None]
        parent = {"stage": parents[-1].stage, "iteration": parents[-1].iteration} if parents else None
        source: list[Any] | None = None
        if own is not None:
            source = started_from(own.checkpoint)
        elif parent is None and self.prepared.source is not None:
            source = asked_start(self.prepared.source, self.settings.checkpoint.ckpt_step)
        kept = self._teachers_backbone() if keeps_backbone else None
        return {
            "tokenizer_hash": self.prepared.token_bytes.hash,
            "parent": parent,
            STARTED_FROM: source,
            KEEPS_BACKBONE: None if kept is None else asdict(kept),
        }
