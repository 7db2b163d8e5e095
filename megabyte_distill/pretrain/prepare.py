"""Before the first update: what the run is made of, where its weights come from, and that all of it fits together."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megabyte_distill.config import STAGE_ORDER, Settings
from megabyte_distill.config.fields import to_fields
from megabyte_distill.config.model import unread_fields
from megabyte_distill.config.run_config import read_run_config
from megabyte_distill.conversion.model_config import (
    MODEL_CONFIG_FILE,
    ModelConfig,
    read_model_config,
    write_model_config,
)
from megabyte_distill.conversion.parallel_sizes import check_parallel_sizes
from megabyte_distill.conversion.tokenizer_files import TOKEN_BYTES_FILE, TOKENIZER_FOLDER
from megabyte_distill.data.token_bytes import TokenBytes
from megabyte_distill.evaluation.run_report import REPORT_FILE
from megabyte_distill.parallel.pipeline import set_virtual_size
from megabyte_distill.parallel.process_groups import World, on_main_rank
from megabyte_distill.pretrain.engine_limits import check_engine_limits
from megabyte_distill.pretrain.run_records import SUMMARY_FILE
from megabyte_distill.run_folder import TEACHER_FILE, is_run, recorded_teacher, teacher_path, write_teacher_path
from megabyte_distill.runs import StageProgress, complete_stages, stage_progress, teacher_identity
from megabyte_distill.training.checkpoint import find_checkpoint, read_loop_state
from megabyte_distill.training.logging import METRICS_FILE

WRITTEN_BY_RUNS = (
    *STAGE_ORDER,
    "tensorboard",
    METRICS_FILE,
    SUMMARY_FILE,
    REPORT_FILE,
    TEACHER_FILE,
    MODEL_CONFIG_FILE,
    TOKENIZER_FOLDER,
)
"""What ``--fresh`` removes from a run's folder, beside its plots; nothing else is touched."""

STARTED_FROM = "started_from"
"""In a checkpoint's loop state: [folder, --ckpt-step] of the run that the stage's weights came from, else None."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """What all stages of a run share."""

    root: Path
    teacher: Path
    """Folder of the converted teacher."""
    teacher_identity: str | None
    """Which weights it has (runs.teacher_identity)."""
    source: Path | None
    """A run whose weights this one starts from (``--load RUN``); None where it starts from the teacher."""
    source_checkpoint: Path | None
    """That of ``source`` which ``--ckpt-step`` names; None means the latest."""
    model_config: ModelConfig
    token_bytes: TokenBytes


def start_fresh(root: Path) -> None:
    """Remove what a former run wrote under ``root``."""
    for name in WRITTEN_BY_RUNS:
        path = root / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    for plot in root.glob("*.png"):
        plot.unlink()


def prepare_run(settings: Settings, world: World) -> Prepared:
    """Resolve ``--load`` and ``--save``, write the run's root on the main rank, check that it is the same run.

    From here on models are cut into the virtual stages that the settings ask for. ValueError where the teacher is
    missing, does not fit the preset, or the folder belongs to another teacher or model.
    """
    root, load = _folder(settings.checkpoint.save, "--save"), _folder(settings.checkpoint.load, "--load")
    source = load if load.is_dir() and is_run(load) else None
    teacher = teacher_path(load) if source is not None else load
    backbone = read_model_config(teacher).backbone
    parallel = settings.parallel
    check_parallel_sizes(
        backbone,
        tensor_parallel=parallel.tensor_model_parallel_size,
        pipeline_parallel=parallel.pipeline_model_parallel_size,
        flags=("--tensor-model-parallel-size", "--pipeline-model-parallel-size"),
        virtual_stages=parallel.num_virtual_stages_per_pipeline_rank,
        layers_per_virtual_stage=parallel.num_layers_per_virtual_pipeline_stage,
        align_layers=settings.align_layers,
    )
    check_engine_limits(settings, backbone, world.device)
    table = TokenBytes.load(teacher / TOKENIZER_FOLDER / TOKEN_BYTES_FILE)
    _check_place(root, teacher, source, fresh=settings.run.fresh)
    source_checkpoint = _source_checkpoint(settings, root, source)
    # only now, when the command is known to have a teacher to start over from
    if settings.run.fresh:
        on_main_rank(world, lambda: start_fresh(root))
    config = ModelConfig(backbone=backbone, byte_side=settings.model.byte_side_for(backbone.hidden_size))
    identity = teacher_identity(teacher)
    for other, flag in ((root, "--save"), (source, "--load")):
        if other is not None and (other / MODEL_CONFIG_FILE).exists():
            _check_same_model(read_model_config(other), config, other, flag)
    _check_same_tokenizer(root, table, teacher)
    for other, flag in ((root, "--save"), (source, "--load")):
        if other is not None and is_run(other):
            _check_same_teacher(other, flag, teacher, identity)
    on_main_rank(world, lambda: _write_root(root, config, teacher, identity))
    set_virtual_size(parallel.virtual_stages(backbone.num_layers))
    return Prepared(
        root=root,
        teacher=teacher,
        teacher_identity=identity,
        source=source,
        source_checkpoint=source_checkpoint,
        model_config=config,
        token_bytes=table,
    )


def _folder(value: str | None, flag: str) -> Path:
    if value is None:
        raise ValueError(f"{flag} is missing: --load names a converted teacher or a run, --save the run's own folder")
    return Path(value)


def _check_place(root: Path, teacher: Path, source: Path | None, *, fresh: bool) -> None:
    """The run's folder may be neither the teacher's nor, with ``--fresh``, the one it reads from."""
    if root.exists() and not root.is_dir():
        raise ValueError(f"--save {root} is not a directory; it names the folder of the run")
    if root.resolve() == teacher.resolve():
        raise ValueError(f"--save {root} is the teacher's own folder; give the run a folder of its own")
    if fresh and source is not None and root.resolve() == source.resolve():
        raise ValueError(f"--fresh would remove {root}, from which --load reads; give another --save")


def _source_checkpoint(settings: Settings, root: Path, source: Path | None) -> Path | None:
    """The checkpoint that ``--ckpt-step`` names, None without it or where the run was built from it before.

    ValueError where no stage would start from it, or it is not there.
    """
    wanted = settings.checkpoint
    flag = f"--ckpt-step {wanted.ckpt_step}"
    if wanted.ckpt_step is None:
        return None
    if source is None:
        raise ValueError(f"{flag}: --load {wanted.load} is a teacher, which has one checkpoint; leave --ckpt-step out")
    first = next(stage for stage in STAGE_ORDER if stage in settings.stages)
    until = () if settings.run.fresh else STAGE_ORDER[: STAGE_ORDER.index(first) + 1]
    held = next((progress for stage in until if (progress := stage_progress(root, stage)) is not None), None)
    if held is None:
        return find_checkpoint(source / _last_complete(source).stage, wanted.ckpt_step)
    if started_from(held.checkpoint) != asked_start(source, wanted.ckpt_step):
        raise ValueError(
            f"{flag}: --save {root} holds stage {held.stage} already, on which the next ones build and which was not "
            "made with this --load and --ckpt-step; leave --ckpt-step out to go on from there, or give another --save"
        )
    return None


def asked_start(source: Path, ckpt_step: int | None) -> list[Any]:
    """What STARTED_FROM is of a stage that ``--load`` and ``--ckpt-step`` gave its weights."""
    return [str(source.resolve()), ckpt_step]


def started_from(checkpoint: Path) -> list[Any] | None:
    """STARTED_FROM of a checkpoint; of an earlier version's what its settings say."""
    state = read_loop_state(checkpoint)
    if STARTED_FROM in state:
        found: list[Any] | None = state[STARTED_FROM]
        return found
    before = read_run_config(checkpoint).checkpoint
    return None if before.load is None else asked_start(Path(before.load), before.ckpt_step)


def _last_complete(source: Path) -> StageProgress:
    complete = complete_stages(source)
    if not complete:
        raise ValueError(f"--load {source} is a run without a complete stage; train it first, or load a teacher")
    return complete[-1]


def _check_same_model(found: ModelConfig, wanted: ModelConfig, folder: Path, flag: str) -> None:
    assert wanted.byte_side is not None
    # another default of a mixer that is not there makes no other model
    unread = unread_fields(wanted.byte_side)
    differences = []
    for section in ("backbone", "byte_side"):
        before, now = to_fields(getattr(found, section)), to_fields(getattr(wanted, section))
        differences += [
            f"{name}: {before[name]} there, {now[name]} now"
            for name in now
            if before[name] != now[name] and name not in unread
        ]
    if differences:
        raise ValueError(
            f"{flag} {folder} holds a run of another model ({'; '.join(differences)}); give the settings it was made "
            "with, another --save, or --fresh to start over"
        )


def _check_same_tokenizer(root: Path, table: TokenBytes, teacher: Path) -> None:
    own = root / TOKENIZER_FOLDER / TOKEN_BYTES_FILE
    if not own.exists() or not is_run(root):
        return
    found = TokenBytes.load(own).hash
    if found != table.hash:
        raise ValueError(
            f"--save {root} holds a run with another tokenizer (hash {found[:16]}…) than the teacher {teacher} has "
            f"({table.hash[:16]}…); give the teacher it was made from, another --save, or --fresh to start over"
        )


def _check_same_teacher(folder: Path, flag: str, teacher: Path, identity: str | None) -> None:
    """A run that does not say which teacher it has been made from is let through, as is a teacher that does not."""
    before = recorded_teacher(folder)
    if before is None or identity is None or before == identity:
        return
    start_over = ", or --fresh to start over" if flag == "--save" else ""
    raise ValueError(
        f"{flag} {folder} holds a run of another teacher (weights {before[:16]}…) than {teacher} is "
        f"({identity[:16]}…); give the teacher it was made from, wherever that lies now, or another {flag}{start_over}"
    )


def _write_root(root: Path, config: ModelConfig, teacher: Path, identity: str | None) -> None:
    # what an earlier version trained here may be of any teacher
    known = recorded_teacher(root) if is_run(root) else identity
    root.mkdir(parents=True, exist_ok=True)
    if not (root / TOKENIZER_FOLDER).exists():
        partial = root / f"{TOKENIZER_FOLDER}.incomplete"
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(teacher / TOKENIZER_FOLDER, partial)
        partial.rename(root / TOKENIZER_FOLDER)
    write_model_config(root, config)
    write_teacher_path(root, teacher, known)


def starting_point(prepared: Prepared, stage: str) -> tuple[Path, str]:
    """(checkpoint, name of what it holds) a stage starts from: the nearest earlier stage, ``--load``, or the teacher.

    ValueError where the nearest earlier stage of this run was left incomplete.
    """
    before = STAGE_ORDER[: STAGE_ORDER.index(stage)]
    for name in reversed(before):
        progress = stage_progress(prepared.root, name)
        if progress is not None and not progress.is_complete:
            raise ValueError(
                f"stage {stage} builds on {name}, which {prepared.root} holds only up to iteration "
                f"{progress.iteration} of {progress.train_iters}; finish it with --stages {name},{stage}"
            )
        if progress is not None:
            return progress.checkpoint, f"stage {name}"
    if prepared.source is not None:
        last = _last_complete(prepared.source)
        return prepared.source_checkpoint or last.checkpoint, f"stage {last.stage} of {prepared.source}"
    return find_checkpoint(prepared.teacher), "teacher"
