"""Before the first update: what the run is made of, where its weights come from, and that all of it fits together."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megabyte_distill.config import STAGE_ORDER, Settings, StageConfig
from megabyte_distill.config.blend import DEFAULT_SPLIT
from megabyte_distill.config.fields import to_fields
from megabyte_distill.config.model import unread_fields
from megabyte_distill.config.run_config import read_run_config
from megabyte_distill.conversion.model_config import (
    MODEL_CONFIG_FILE,
    TEACHER_FILE,
    ModelConfig,
    is_run,
    read_model_config,
    write_model_config,
)
from megabyte_distill.conversion.parallel_sizes import check_parallel_sizes
from megabyte_distill.conversion.run_folder import teacher_path
from megabyte_distill.conversion.tokenizer_files import TOKEN_BYTES_FILE, TOKENIZER_FOLDER
from megabyte_distill.curriculum.stages import STAGES
from megabyte_distill.data.chunk_merging import SAMPLE_ROW_BYTES, sample_rows
from megabyte_distill.data.dataset import ByteTokenDataset, open_blend, split_documents
from megabyte_distill.data.formats import partial_path, publish, write_and_sync
from megabyte_distill.data.mock import MockRowStream
from megabyte_distill.data.packing import PackedRow
from megabyte_distill.data.sampler import RowPlan, RowStream
from megabyte_distill.data.stored_targets import StoredTargets
from megabyte_distill.data.token_bytes import TokenBytes
from megabyte_distill.parallel.pipeline import set_virtual_size
from megabyte_distill.parallel.process_groups import World, on_main_rank
from megabyte_distill.pretrain.engine_limits import check_engine_limits
from megabyte_distill.runs import StageProgress, complete_stages, stage_progress
from megabyte_distill.training.checkpoint import find_checkpoint
from megabyte_distill.training.target_cache import TargetCache, teacher_hash

WRITTEN_BY_RUNS = (
    *STAGE_ORDER,
    "tensorboard",
    "metrics.jsonl",
    "summary.json",
    "report.html",
    TEACHER_FILE,
    MODEL_CONFIG_FILE,
    TOKENIZER_FOLDER,
)
"""What ``--fresh`` removes from a run's folder, beside its plots; nothing else is touched."""

WeightedSets = tuple[list[ByteTokenDataset], list[float]]
"""Data sets of a blend and their weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """What all stages of a run share."""

    root: Path
    teacher: Path
    """Folder of the converted teacher."""
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
    for other, flag in ((root, "--save"), (source, "--load")):
        if other is not None and (other / MODEL_CONFIG_FILE).exists():
            _check_same_model(read_model_config(other), config, other, flag)
    _check_same_tokenizer(root, table, teacher)
    on_main_rank(world, lambda: _write_root(root, config, teacher))
    set_virtual_size(parallel.virtual_stages(backbone.num_layers))
    return Prepared(
        root=root,
        teacher=teacher,
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
    before = read_run_config(held.checkpoint).checkpoint
    if (before.load, before.ckpt_step) != (wanted.load, wanted.ckpt_step):
        raise ValueError(
            f"{flag}: --save {root} holds stage {held.stage} already, on which the next ones build and which was not "
            "made with this --load and --ckpt-step; leave --ckpt-step out to go on from there, or give another --save"
        )
    return None


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


def _write_root(root: Path, config: ModelConfig, teacher: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    if not (root / TOKENIZER_FOLDER).exists():
        partial = root / f"{TOKENIZER_FOLDER}.incomplete"
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(teacher / TOKENIZER_FOLDER, partial)
        partial.rename(root / TOKENIZER_FOLDER)
    write_model_config(root, config)
    pointer = root / TEACHER_FILE
    write_and_sync(partial_path(pointer), (json.dumps({"teacher": str(teacher.resolve())}) + "\n").encode())
    publish(pointer)


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


def check_data(settings: Settings, prepared: Prepared) -> None:
    """ValueError before any training where a stage's data are not what it reads, or no text is held out to measure."""
    shared = None if settings.data.mock_data else data_sets(settings, prepared)
    sharing = [config for config in settings.stages.values() if not config.dialogue_data_path]
    if shared is not None:
        wanted = settings.run.summary_bytes > 0 or any(config.eval_iters for config in sharing)
        _check_held_out(settings, shared, wanted=wanted)
    for name, config in settings.stages.items():
        own = data_sets(settings, prepared, config) if config.dialogue_data_path else None
        if own is not None:
            _check_held_out(settings, own, wanted=config.eval_iters > 0)
        found = own or shared
        if found is not None and STAGES[name].reads_loss_mask:
            _check_loss_masks(name, [*found[0][0], *found[1][0]])


def _check_held_out(settings: Settings, found: tuple[WeightedSets, WeightedSets], *, wanted: bool) -> None:
    if wanted and not found[1][0]:
        raise ValueError(
            f"no document is held out by --split {settings.data.split or DEFAULT_SPLIT}: give --valid-data-path, a "
            "--split with a larger second share, or --eval-iters 0 --summary-bytes 0 to train without measuring"
        )


def _check_loss_masks(stage: str, datasets: Sequence[ByteTokenDataset]) -> None:
    without = [dataset.name for dataset in datasets if not dataset.has_loss_mask]
    if without:
        raise ValueError(
            f"stage {stage} trains on the answers of dialogues, and {without[0]} has no loss mask that tells them from "
            "prompts: it was preprocessed as plain text. Preprocess dialogues with tools/preprocess_bytes.py "
            f"--chat-template chatml, and give them with --{stage}.dialogue-data-path (docs/training.md)"
        )


def data_sets(
    settings: Settings, prepared: Prepared, config: StageConfig | None = None
) -> tuple[WeightedSets, WeightedSets]:
    """(training, held-out) data sets of the command line; a set whose share of ``--split`` is empty is left out.

    ``config``: of a stage, which may have data of its own. ValueError where data and teacher do not belong together or
    files are damaged.
    """
    data, tokenizer_hash = settings.data, prepared.token_bytes.hash
    data_path = (config.dialogue_data_path if config is not None else ()) or data.data_path
    if not data_path:
        train = open_blend(data.train_data_path, tokenizer_hash=tokenizer_hash)
        return train, open_blend(data.valid_data_path, tokenizer_hash=tokenizer_hash)
    datasets, weights = open_blend(data_path, tokenizer_hash=tokenizer_hash)
    parts: tuple[WeightedSets, WeightedSets] = ([], []), ([], [])
    for dataset, weight in zip(datasets, weights, strict=True):
        for (sets, kept), documents in zip(parts, split_documents(len(dataset), data.split_shares)[:2], strict=True):
            if len(documents):
                sets.append(dataset.subset(documents))
                kept.append(weight)
    return parts


def stored_targets(
    settings: Settings, config: StageConfig, prepared: Prepared, rows: RowStream, *, has_losses: bool
) -> Callable[[RowPlan], StoredTargets] | None:
    """What gives the exact targets of a stage's planned rows from ``--logits-load-dir``; None where it is not given.

    ``has_losses``: this rank is at the pipeline's end; None on the others, which read no targets.
    ValueError where the cache is incomplete, damaged, or of another teacher, tokenizer or text.
    """
    if config.logits_load_dir is None or not has_losses:
        return None
    cache = TargetCache(Path(config.logits_load_dir), verify=settings.checkpoint.verify_checkpoint)
    teacher = teacher_hash(find_checkpoint(prepared.teacher))
    cache.require(tokenizer_hash=prepared.token_bytes.hash, teacher=teacher, datasets=rows.datasets)
    return lambda plan: cache.of_row(plan, rows.datasets, rows.row_bytes)


def row_seed(seed: int, stage: str) -> int:
    """Of the order in which a stage of a run with this seed reads its data."""
    return seed + 1000 * (1 + STAGE_ORDER.index(stage))


def chunk_sample(settings: Settings, prepared: Prepared) -> list[PackedRow]:
    """Training text on which chunks are measured: the same in every stage, at any length of rows and for any seed.

    The run's, also in a stage with data of its own, so that an equal length is an equal limit.
    """
    size: dict[str, Any] = {"row_bytes": SAMPLE_ROW_BYTES, "chunk_bucket": 1, "seed": 0}
    if settings.data.mock_data:
        return sample_rows(MockRowStream(prepared.model_config.backbone.vocab_size, **size))
    (train, weights), _ = data_sets(settings, prepared)
    return sample_rows(RowStream(train, weights, **size))


def row_streams(
    settings: Settings, config: StageConfig, prepared: Prepared, stage: str
) -> tuple[RowStream, RowStream | None]:
    """(training rows, held-out rows or None) of a stage. Each stage reads its data in another order."""
    seed = row_seed(settings.run.seed, stage)
    size: dict[str, Any] = {"row_bytes": config.seq_length, "chunk_bucket": config.chunk_bucket}
    size["reads_loss_mask"] = STAGES[stage].reads_loss_mask
    if settings.data.mock_data and not config.dialogue_data_path:
        vocab_size = prepared.model_config.backbone.vocab_size
        streams = (MockRowStream(vocab_size, seed=s, **size) for s in (seed, 1))
        return next(streams), next(streams)
    (train, weights), (held_out, held_out_weights) = data_sets(settings, prepared, config)
    held_out_rows = RowStream(held_out, held_out_weights, seed=1, **size) if held_out else None
    return RowStream(train, weights, seed=seed, **size), held_out_rows
