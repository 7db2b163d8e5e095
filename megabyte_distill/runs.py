"""A run on disk: RUN/<stage>/iter_N, what it was made from, and how to get a model out of it.

Layout::

    RUN/model_config.json    backbone and byte side
    RUN/tokenizer/           the teacher's tokenizer and its token table
    RUN/teacher.json         where the teacher's checkpoint lies
    RUN/1a/ … RUN/3a/        checkpoints of each stage
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from megabyte_distill.config.stage import STAGE_ORDER, TRAINS_DECODER, StageConfig
from megabyte_distill.config.training import Settings
from megabyte_distill.conversion.model_config import ModelConfig, read_model_config
from megabyte_distill.conversion.teacher_folder import Teacher, load_teacher
from megabyte_distill.conversion.tokenizer_files import TOKEN_BYTES_FILE, TOKENIZER_FOLDER
from megabyte_distill.data.token_bytes import TokenBytes
from megabyte_distill.model.backbone import Backbone, transformer_config
from megabyte_distill.model.parallel_linears import byte_side_linears
from megabyte_distill.model.student import Student
from megabyte_distill.parallel.pipeline import built_in_stages
from megabyte_distill.parallel.process_groups import current_world
from megabyte_distill.run_folder import find_run_teacher, require_run
from megabyte_distill.training.checkpoint import find_checkpoint, latest_iteration, load_checkpoint, read_loop_state
from megabyte_distill.training.manifest import manifest_text, read_manifest
from megabyte_distill.training.rows import CHUNK_LIMIT

KEEPS_BACKBONE = "keeps_backbone"
"""In a checkpoint's loop state: the fields of :class:`KeptBackbone`, None where the backbone has been trained."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageProgress:
    """How far a stage of a run came."""

    stage: str
    checkpoint: Path
    iteration: int
    train_iters: int

    @property
    def is_complete(self) -> bool:
        """True where its last update is saved."""
        return self.iteration >= self.train_iters


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedStudent:
    """A student with the weights of a stage, and what belongs to it."""

    student: Student
    model_config: ModelConfig
    token_bytes: TokenBytes
    stage: str
    checkpoint: Path


def stage_progress(root: Path, stage: str) -> StageProgress | None:
    """The newest complete checkpoint of a stage, None where there is none."""
    folder = root / stage
    if latest_iteration(folder) is None:
        return None
    checkpoint = find_checkpoint(folder)
    state = read_loop_state(checkpoint)
    return StageProgress(
        stage=stage,
        checkpoint=checkpoint,
        iteration=int(state["progress"]["iteration"]),
        train_iters=int(state["train_iters"]),
    )


def complete_stages(root: Path, before: str | None = None) -> list[StageProgress]:
    """A run's complete stages in order; only those ``before`` one where it is given."""
    names = STAGE_ORDER if before is None else STAGE_ORDER[: STAGE_ORDER.index(before)]
    return [p for name in names if (p := stage_progress(root, name)) is not None and p.is_complete]


def chunk_limit(checkpoint: Path) -> float | None:
    """What a stage merged tokens with at a checkpoint (``chunk_merging.merge_row``); None where it did not."""
    limit = read_loop_state(checkpoint)["rows"].get(CHUNK_LIMIT)
    return None if limit is None else float(limit)


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptBackbone:
    """What a backbone is that nothing has trained."""

    teacher: str
    """Whose weights it has: :func:`teacher_identity`."""
    bf16: bool
    """Whether they were rounded to it."""


def kept_backbone(checkpoint: Path) -> KeptBackbone | None:
    """None where a checkpoint's backbone has been trained, or the checkpoint does not say which teacher's it is."""
    kept = read_loop_state(checkpoint).get(KEEPS_BACKBONE)
    return KeptBackbone(**kept) if isinstance(kept, dict) else None


def teacher_identity(teacher: Path) -> str | None:
    """Says which weights a converted teacher has, wherever its folder lies; None where it does not list its files.

    Reads the list alone, of which the tensors' files count: the others differ from one conversion to the next. What is
    wrong with a list is said when the teacher is loaded.
    """
    try:
        listed = read_manifest(find_checkpoint(teacher)) or {}
    except ValueError:
        return None
    tensors = {name: record for name, record in listed.items() if name.endswith(".distcp")}
    return hashlib.sha256(manifest_text(tensors).encode()).hexdigest() if tensors else None


def last_stage(root: Path) -> StageProgress:
    """The last stage that is complete. ValueError where there is none."""
    found = complete_stages(root)
    if not found:
        raise ValueError(f"{root} holds no complete stage (looked for {', '.join(STAGE_ORDER)}); train it first")
    return found[-1]


def backbone_overrides(settings: Settings, config: StageConfig) -> dict[str, object]:
    """Fields of megatron's TransformerConfig that a stage's settings decide, for student and teacher."""
    return {
        "sequence_parallel": settings.parallel.sequence_parallel,
        "pipeline_dtype": training_dtype(settings),
        "microbatch_group_size_per_vp_stage": settings.parallel.micro_batch_group,
        **settings.engine.transformer_fields,
        **config.recompute_fields,
    }


def training_dtype(settings: Settings) -> torch.dtype:
    """Of weights, activations and what goes between pipeline stages; the optimizer's masters are fp32."""
    return torch.bfloat16 if settings.run.bf16 else torch.float32


def build_student(
    config: ModelConfig,
    backbone: Backbone | None = None,
    *,
    overrides: Mapping[str, object] | None = None,
    vp_stage: int = 0,
) -> Student:
    """A student with fresh weights in megatron's layers (or around the given backbone).

    ``overrides``: fields of megatron's TransformerConfig; ``vp_stage``: which of this rank's virtual stages it is.
    """
    assert config.byte_side is not None
    with torch.random.fork_rng(devices=[]):  # how many layers are drawn here says nothing about the byte side
        host = backbone or Backbone(
            config.backbone, transformer_config(config.backbone, **(overrides or {})), vp_stage=vp_stage
        )
    return Student(config.byte_side, host, byte_side_linears())


def build_model(config: ModelConfig, *, overrides: Mapping[str, object] | None = None) -> nn.Module:
    """What this rank holds of a student: :func:`build_student`, under virtual stages one for each of them."""
    return built_in_stages(lambda number: build_student(config, overrides=overrides, vp_stage=number))


def load_student(
    root: str | os.PathLike[str], stage: str | None = None, *, iteration: int | None = None
) -> LoadedStudent:
    """The student of a run after a stage (default: the last complete one), in evaluation mode.

    ValueError where the folder is no run or the stage is not there. Needs process groups (process_groups.world).
    """
    root = Path(root)
    require_run(root)
    name = stage or last_stage(root).stage
    checkpoint = find_checkpoint(root / name, iteration)
    config = read_model_config(root)
    student = build_student(config)
    load_checkpoint(checkpoint, student)
    return LoadedStudent(
        student=student.to(current_world().device).eval(),
        model_config=config,
        token_bytes=TokenBytes.load(root / TOKENIZER_FOLDER / TOKEN_BYTES_FILE),
        stage=name,
        checkpoint=checkpoint,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStudents:
    """The students a run's figures are taken from, all in evaluation mode."""

    last: LoadedStudent
    """After the last complete stage, or the one asked for."""
    aligned: Student | None
    """After 1a, None where that is not complete."""
    distilled: Student | None
    """After 1b, None where that is not complete."""


def load_students(root: Path, stage: str | None = None) -> RunStudents:
    """The students of a run; collective, as every load. Errors as :func:`load_student`."""

    def after(name: str) -> Student | None:
        progress = stage_progress(root, name)
        return load_student(root, name).student if progress is not None and progress.is_complete else None

    return RunStudents(last=load_student(root, stage), aligned=after("1a"), distilled=after("1b"))


def speaking_stage(root: Path, stage: str | None = None) -> str:
    """The stage, or the last complete one of the run, whose student can generate.

    ValueError where the decoder was not trained yet, where nothing is complete, and for a folder that is no run.
    """
    require_run(root)
    name = stage or last_stage(root).stage
    if name in TRAINS_DECODER:
        return name
    complete = [progress.stage for progress in complete_stages(root)]
    able = [one for one in complete if one in TRAINS_DECODER]
    advice = f"take {root / able[-1]}" if able else "train on first (--stages 2a,2b)"
    raise ValueError(
        f"after stage {name} the decoder is untrained and cannot generate; complete in {root}: "
        f"{', '.join(complete) or 'nothing'}; {advice}"
    )


def load_run_teacher(root: Path, override: Path | None = None) -> Teacher:
    """The teacher a run was distilled from; ``override`` where it moved."""
    # in fp32 as the student is, so that their figures compare
    teacher = load_teacher(find_run_teacher(root, override), dtype=torch.float32)
    teacher.backbone.eval()
    return teacher
