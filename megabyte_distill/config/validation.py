"""What is wrong with settings that are each readable: ranges, contradictions and what is missing, all collected."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from typing import Any

from megabyte_distill import optional
from megabyte_distill.config.blend import parse_blend
from megabyte_distill.config.engine import EngineConfig, Fp8Recipe, TransformerImpl
from megabyte_distill.config.layers import SECTIONS
from megabyte_distill.config.model import MAX_NGRAM, ByteMixer
from megabyte_distill.config.options import options_of, range_problem
from megabyte_distill.config.stage import (
    CHOOSES_TARGETS,
    MERGES_IN,
    STAGE_ORDER,
    BoundarySource,
    ByteTargets,
    RecomputeGranularity,
    StageConfig,
    TargetsFrom,
    runs_backbone,
)
from megabyte_distill.config.training import ParallelConfig, Settings

_CACHE_WITHOUT_MASK = (
    "the cached targets are of each document alone; without --document-mask a teacher beside the student would read "
    "the row's earlier documents as well; give --document-mask, or leave the cache out"
)


def problems_of(settings: Settings, *, world_size: int = 1) -> list[str]:
    """Every problem of resolved settings for a job of ``world_size`` ranks; empty means they can run."""
    return [
        *_stage_selection(settings),
        *_ranges(settings),
        *_model(settings),
        *_data(settings),
        *_checkpoint(settings),
        *_parallel(settings, world_size),
        *_engine(settings),
        *_stages(settings, world_size),
    ]


def stage_name_problems(names: tuple[str, ...]) -> list[str]:
    """What is wrong with a selection of stages."""
    known = ", ".join(STAGE_ORDER)
    if not names:
        return [f"--stages names no stage; choose from {known}"]
    problems = [
        f"--stages: unknown stage {name!r}; the stages are {known}" for name in names if name not in STAGE_ORDER
    ]
    problems += [f"--stages: {name} occurs twice" for name in dict.fromkeys(names) if names.count(name) > 1]
    order = [STAGE_ORDER.index(name) for name in names if name in STAGE_ORDER]
    if order != sorted(order):
        expected = ",".join(STAGE_ORDER[place] for place in sorted(set(order)))
        problems.append(f"--stages {','.join(names)}: a stage builds on those before it; the order is {expected}")
    return problems


def _stage_selection(settings: Settings) -> list[str]:
    return stage_name_problems(settings.run.stage_names)


def _ranges(settings: Settings) -> Iterator[str]:
    holders: dict[str, Any] = {
        "run": settings.run,
        "model": settings.model,
        "data": settings.data,
        "checkpoint": settings.checkpoint,
        "parallel": settings.parallel,
        "engine": settings.engine,
    }
    for section, holder in holders.items():
        for item in options_of(SECTIONS[section], section):
            problem = range_problem(item, getattr(holder, item.name))
            if problem:
                yield f"--{item.flag}: {problem}"
    for item in options_of(StageConfig, "stage"):
        acting = {stage: config for stage, config in settings.stages.items() if item.acts_in(stage)}
        found = {stage: range_problem(item, getattr(config, item.name)) for stage, config in acting.items()}
        yield from _by_stage(item.flag, found)


def _by_stage(flag: str, found: Mapping[str, str | None]) -> Iterator[str]:
    """One message where every stage has the same problem, else one a stage."""
    problems = set(found.values())
    if len(problems) == 1 and (problem := next(iter(problems))) is not None and len(found) > 1:
        yield f"--{flag}: {problem}"
        return
    for stage, problem in found.items():
        if problem is not None:
            yield f"--{stage}.{flag}: {problem}"


def _model(settings: Settings) -> Iterator[str]:
    side = settings.model.byte_side
    for item in fields(side):
        value = getattr(side, item.name)
        flag = item.name.replace("_", "-")
        if item.name == "backbone_width":
            if value < 0:
                yield f"--{flag}: got {value}, expected the teacher's hidden size, or 0 to read it from the teacher"
        elif item.name == "conv_dilations":
            if not value or min(value) < 1:
                yield f"--{flag}: got {value}, expected one or more whole numbers from 1 up"
        elif item.name == "byte_ngram_tables":
            if not set(value) <= set(range(2, MAX_NGRAM + 1)) or list(value) != sorted(set(value)):
                yield f"--{flag}: got {value}, expected different whole numbers from 2 to {MAX_NGRAM}, ascending"
        elif isinstance(value, int | float) and value <= 0:
            yield f"--{flag}: got {value}, expected more than 0"
    inner = side.byte_width * side.mamba_expand
    if side.byte_mixer is ByteMixer.MAMBA2 and side.mamba_head_dim > 0 and inner % side.mamba_head_dim:
        yield (
            f"--byte-width {side.byte_width} × --mamba-expand {side.mamba_expand} = {inner} is not a multiple of "
            f"--mamba-head-dim {side.mamba_head_dim}"
        )
    if side.byte_mixer is ByteMixer.LOCAL_ATTENTION and side.byte_attention_head_dim > 0:
        head_dim = side.byte_attention_head_dim
        if head_dim % 2:
            yield f"--byte-attention-head-dim: got {head_dim}, expected an even number: RoPE turns pairs of features"
        if side.byte_width % head_dim:
            yield f"--byte-width {side.byte_width} is not a multiple of --byte-attention-head-dim {head_dim}"


def _data(settings: Settings) -> Iterator[str]:
    data = settings.data
    # parse_arguments has put the file's words into data_path, or reported that it could not
    blend_flag = "--data-path" if data.data_args_path is None else "--data-args-path"
    has_blend = bool(data.data_path) or data.data_args_path is not None
    own = [config.dialogue_data_path for config in settings.stages.values() if config.dialogue_data_path]
    if not (has_blend or data.train_data_path or data.valid_data_path or data.mock_data):
        more = ""
        if own:
            more = f"; where 3a runs alone, its dialogues are the run's data: --data-path {' '.join(own[0])}"
        yield f"no data: give --data-path, or --train-data-path with --valid-data-path, or --mock-data{more}"
        return
    given = {
        blend_flag: has_blend,
        "--train-data-path": bool(data.train_data_path),
        "--valid-data-path": bool(data.valid_data_path),
        "--split": data.split is not None,
    }
    if data.mock_data:
        for flag, is_given in given.items():
            if is_given:
                yield f"--mock-data and {flag} contradict each other: mock data is random; leave one out"
    elif has_blend:
        for flag in ("--train-data-path", "--valid-data-path"):
            if given[flag]:
                yield f"{blend_flag} is cut by --split and contradicts {flag}; give --train-data-path instead of it"
    else:
        if not data.train_data_path:
            yield "--valid-data-path needs --train-data-path"
        if not data.valid_data_path:
            yield "--train-data-path needs --valid-data-path, for the evaluations"
        if data.split is not None and not own:
            yield "--split cuts what --data-path names and does nothing for separate sets; leave it out"
    yield from _unreadable("--split", lambda: data.split_shares)
    yield from _unreadable(blend_flag, lambda: data.blend)
    yield from _unreadable("--train-data-path", lambda: data.train_blend)
    yield from _unreadable("--valid-data-path", lambda: data.valid_blend)
    yield from _unreadable("--dialogue-data-path", lambda: [parse_blend(words) for words in own])


def _unreadable(flag: str, read: Callable[[], object]) -> Iterator[str]:
    try:
        read()
    except ValueError as error:
        yield f"{flag}: {error}"


def _checkpoint(settings: Settings) -> Iterator[str]:
    checkpoint = settings.checkpoint
    if checkpoint.load is None and checkpoint.ckpt_step is not None:
        yield "--ckpt-step needs --load, whose checkpoint it is about"
    if checkpoint.save_retain_interval and not checkpoint.keep_last_checkpoints:
        yield "--save-retain-interval is about --keep-last-checkpoints N, without which all are kept; give both"
    if settings.run.fresh and checkpoint.save is None:
        yield "--fresh needs --save, the folder to start over"
    if settings.run.fresh and checkpoint.load is not None and checkpoint.load == checkpoint.save:
        yield f"--fresh removes {checkpoint.save}, from which --load wants to read; give another --save"


def _parallel(settings: Settings, world_size: int) -> Iterator[str]:
    if settings.parallel.model_parallel_size < 1:
        return  # named elsewhere
    try:
        settings.parallel.data_parallel_size(world_size)
    except ValueError as error:
        yield str(error)
    yield from _overlaps(settings.parallel)
    yield from _virtual_stages(settings.parallel)
    tensor = settings.parallel.tensor_model_parallel_size
    if settings.parallel.sequence_parallel and tensor == 1:
        yield (
            "--sequence-parallel cuts over tensor-parallel ranks: give --tensor-model-parallel-size above 1, or leave "
            "it out"
        )
    for stage, config in settings.stages.items() if settings.parallel.sequence_parallel else ():
        if config.chunk_bucket % tensor:
            yield (
                f"stage {stage}: --sequence-parallel needs a --chunk-bucket that --tensor-model-parallel-size {tensor} "
                f"divides, got {config.chunk_bucket}"
            )
        rows = config.micro_batch_size * config.seq_length
        if settings.parallel.pipeline_model_parallel_size > 1 and rows % tensor:
            yield (
                f"stage {stage}: with --sequence-parallel, pipeline stages hand over --micro-batch-size × --seq-length "
                f"= {rows} bytes in parts, which --tensor-model-parallel-size {tensor} must divide"
            )


def _overlaps(parallel: ParallelConfig) -> Iterator[str]:
    missing = [
        flag
        for flag, given in (
            ("--use-distributed-optimizer", parallel.use_distributed_optimizer),
            ("--overlap-grad-reduce", parallel.overlap_grad_reduce),
        )
        if not given
    ]
    if parallel.overlap_param_gather and missing:
        yield f"--overlap-param-gather gathers what the distributed optimizer cut; give {' and '.join(missing)} as well"


def _virtual_stages(parallel: ParallelConfig) -> Iterator[str]:
    by_number, by_layers = "--num-virtual-stages-per-pipeline-rank", "--num-layers-per-virtual-pipeline-stage"
    group = "--microbatch-group-size-per-virtual-pipeline-stage"
    size, ranks = parallel.microbatch_group_size_per_virtual_pipeline_stage, parallel.pipeline_model_parallel_size
    if parallel.num_virtual_stages_per_pipeline_rank and parallel.num_layers_per_virtual_pipeline_stage:
        yield f"{by_number} and {by_layers} say the same thing twice; leave one out"
    if parallel.is_interleaved and ranks == 1:
        flag = by_layers if parallel.num_layers_per_virtual_pipeline_stage else by_number
        yield f"{flag} interleaves a pipeline's ranks: give --pipeline-model-parallel-size above 1, or leave it out"
    if size and not parallel.is_interleaved:
        yield f"{group} is about virtual pipeline stages: give {by_number} above 1 or {by_layers}, or leave it out"
    elif size and size < ranks:
        yield f"{group}: got {size}, expected at least --pipeline-model-parallel-size {ranks}"


def _engine(settings: Settings) -> Iterator[str]:
    engine, default = settings.engine, EngineConfig()
    uses_engine = engine.transformer_impl is TransformerImpl.TRANSFORMER_ENGINE
    # a dry run counts bytes, which are the same, and may run on another machine than the job
    why = optional.engine_problem() if uses_engine and not settings.run.dry_run else None
    if why is not None:
        yield (
            f"--transformer-impl transformer_engine: the package transformer_engine {why}; leave the flag out for "
            "megatron-core's own layers, or use an image that has it (docs/transformer-engine.md)"
        )
    if engine.fp8_format is None:
        for flag, is_given in (
            ("--fp8-recipe", engine.fp8_recipe is not default.fp8_recipe),
            ("--first-last-layers-bf16", engine.first_last_layers_bf16),
        ):
            if is_given:
                yield f"{flag} is about --fp8-format, which is not given; give that, or leave it out"
    else:
        yield from _fp8(settings, uses_engine)
    for flag in ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"):
        if getattr(engine, flag) != getattr(default, flag) and not engine.first_last_layers_bf16:
            yield f"--{flag.replace('_', '-')} is about --first-last-layers-bf16; give that, or leave it out"


def _fp8(settings: Settings, uses_engine: bool) -> Iterator[str]:
    engine = settings.engine
    if not uses_engine:
        yield "--fp8-format runs in Transformer Engine's layers; give --transformer-impl transformer_engine as well"
    if not settings.run.bf16:
        yield "--fp8-format needs --bf16: what does not run in FP8 runs in bfloat16"
    if engine.first_last_layers_bf16 and engine.fp8_recipe is Fp8Recipe.DELAYED:
        yield (
            "--first-last-layers-bf16 and --fp8-recipe delayed: that recipe takes its scaling factors once for all "
            "layers, so that none can be left out (megatron-core refuses it); take --fp8-recipe tensorwise"
        )
    if settings.run.rerun_check and engine.fp8_recipe is Fp8Recipe.DELAYED:
        yield (
            "--rerun-check and --fp8-recipe delayed: the second of two passes has the scaling factors that the first "
            "left behind, and other bits; take --fp8-recipe tensorwise, or leave one out"
        )
    ranks = settings.parallel.tensor_model_parallel_size if settings.parallel.sequence_parallel else 1
    multiple = engine.chunk_multiple * max(1, ranks)
    because = f"--fp8-recipe {engine.fp8_recipe.value} multiplies rows by {engine.chunk_multiple}s"
    because += f" on each of {ranks} ranks" if ranks > 1 else ""
    buckets = {stage: config.chunk_bucket for stage, config in settings.stages.items() if runs_backbone(stage, config)}
    found: dict[str, str | None] = dict.fromkeys(buckets)
    for stage, bucket in buckets.items():
        if bucket > 0 and bucket % multiple:
            better = -(-bucket // multiple) * multiple
            found[stage] = f"got {bucket}, expected a multiple of {multiple} ({because}); {better} would be"
    yield from _by_stage("chunk-bucket", found)


def _stages(settings: Settings, world_size: int) -> Iterator[str]:
    batch: dict[str, str | None] = {}
    for stage, config in settings.stages.items():
        batch[stage] = _batch_problem(config, settings.parallel, world_size)
        yield from _stage_contradictions(stage, config)
    cached = [stage for stage, config in settings.stages.items() if config.logits_load_dir is not None]
    if not settings.model.document_mask:
        yield from _by_stage("logits-load-dir", dict.fromkeys(cached, _CACHE_WITHOUT_MASK))
    found = {problem for problem in batch.values() if problem}
    if len(found) == 1 and all(batch.values()):
        yield next(iter(found))
    else:
        yield from (f"stage {stage}: {problem}" for stage, problem in batch.items() if problem)


def _batch_problem(config: StageConfig, parallel: ParallelConfig, world_size: int) -> str | None:
    ranks = parallel.whole_copies(world_size)
    if ranks < 1 or config.micro_batch_size < 1 or config.global_batch_size < 1:
        return None  # named elsewhere
    try:
        micro_batches = config.micro_batches(ranks)
    except ValueError as error:
        return str(error)
    return _interleaving_problem(micro_batches, parallel) if parallel.is_interleaved else None


def _interleaving_problem(micro_batches: int, parallel: ParallelConfig) -> str | None:
    """megatron's interleaved schedule takes whole groups, the last of at least as many as there are pipeline ranks."""
    group, ranks = parallel.micro_batch_group, parallel.pipeline_model_parallel_size
    if group < ranks or (micro_batches >= group and not 0 < micro_batches % group < ranks):
        return None  # a group that is too small is named elsewhere
    expected = f"a multiple of {group}" + (f", or {ranks} to {group - 1} more than one" if group > ranks else "")
    return (
        f"--global-batch-size gives each copy of the model {micro_batches} micro-batches an update; virtual pipeline "
        f"stages need {expected}"
    )


def _stage_contradictions(stage: str, config: StageConfig) -> Iterator[str]:
    if config.min_lr is not None and config.min_lr_ratio is not None:
        yield f"stage {stage}: --min-lr and --min-lr-ratio say the same thing twice; leave one out"
    if config.min_lr is not None and config.min_lr > config.lr:
        yield f"stage {stage}: --min-lr {config.min_lr} is above --lr {config.lr}"
    if config.lr_warmup_fraction is not None and config.lr_warmup_iters is not None:
        yield f"stage {stage}: --lr-warmup-fraction and --lr-warmup-iters say the same thing twice; leave one out"
    if config.lr_warmup_iters is not None and config.lr_warmup_iters > config.train_iters:
        yield (
            f"stage {stage}: --lr-warmup-iters {config.lr_warmup_iters} is more than --train-iters "
            f"{config.train_iters}: the learning rate would never arrive"
        )
    yield from (f"stage {stage}: {problem}" for problem in _recompute_problems(config))
    yield from (f"stage {stage}: {problem}" for problem in _chunk_size_problems(stage, config))
    if config.freeze_backbone and config.backbone_lr is not None:
        yield f"stage {stage}: --freeze-backbone and --backbone-lr contradict each other; leave one out"
    yield from (f"stage {stage}: {problem}" for problem in _unused_loss_settings(stage, config))


def _unused_loss_settings(stage: str, config: StageConfig) -> Iterator[str]:
    """Settings of a loss that is another one here; given for all stages, they mean those that they act in."""
    default, targets = StageConfig(), config.byte_targets
    if (
        stage == "1a"
        and config.align_layers_loss_weight != default.align_layers_loss_weight
        and not config.align_layers
    ):
        yield "--align-layers-loss-weight weighs the error behind --align-layers, which is 0 here"
    if stage not in CHOOSES_TARGETS:
        return
    if config.kd_loss_alpha != default.kd_loss_alpha and targets is not ByteTargets.MIXED:
        yield f"--kd-loss-alpha weighs --byte-targets mixed, which is {targets.value} here"
    if config.kd_temperature != default.kd_temperature and targets is ByteTargets.HARD:
        yield "--kd-temperature is about --byte-targets exact or mixed, which is hard here"
    if config.logits_load_dir is not None and targets is ByteTargets.HARD:
        yield "--logits-load-dir holds the targets of --byte-targets exact or mixed, which is hard here"
    whose = config.exact_targets_from
    if stage == "2a" and whose is not TargetsFrom.AUTO and config.logits_load_dir is not None:
        yield f"--exact-targets-from {whose.value} and --logits-load-dir name two sources of the targets; leave one out"
    if stage == "2a" and whose is TargetsFrom.STUDENT:
        yield from _unfit_for_own_targets(config)
    if config.kd_temperature != default.kd_temperature and config.target_bytes_per_chunk is not None:
        yield (
            "--kd-temperature compares pairs of byte and bit, of which --target-bytes-per-chunk leaves the teacher the "
            "bytes alone; leave one out"
        )


def _unfit_for_own_targets(config: StageConfig) -> Iterator[str]:
    """The student's backbone tells of gold tokens where it has read them, and of nothing else."""
    flag = "--exact-targets-from student"
    if config.byte_targets is ByteTargets.HARD:
        yield f"{flag} is about --byte-targets exact or mixed, which is hard here"
    if config.boundary_source is not BoundarySource.GOLD:
        yield f"{flag} needs chunks that are the teacher's tokens; give --boundary-source gold, or leave it out"
    if config.target_bytes_per_chunk is not None:
        yield f"{flag} needs chunks that are the teacher's tokens; leave it or --target-bytes-per-chunk out"


def _chunk_size_problems(stage: str, config: StageConfig) -> Iterator[str]:
    if stage not in MERGES_IN:
        return
    ramp, start = config.target_bytes_per_chunk_iters, config.target_bytes_per_chunk_start
    if config.target_bytes_per_chunk is None:
        for flag, is_given in (("start", start is not None), ("iters", ramp > 0)):
            if is_given:
                yield f"--target-bytes-per-chunk-{flag} is about --target-bytes-per-chunk; give that, or leave it out"
    elif start is not None and not ramp:
        yield (
            "--target-bytes-per-chunk-start is where a change of length begins; give --target-bytes-per-chunk-iters as "
            "well, or leave it out"
        )
    if ramp > config.train_iters:
        yield (
            f"--target-bytes-per-chunk-iters {ramp} is more than --train-iters {config.train_iters}: chunks would "
            "never be as long as asked for"
        )


def _recompute_problems(config: StageConfig) -> Iterator[str]:
    belongs = {
        "--recompute-method": (config.recompute_method is not None, RecomputeGranularity.FULL),
        "--recompute-num-layers": (config.recompute_num_layers is not None, RecomputeGranularity.FULL),
        "--recompute-modules": (bool(config.recompute_modules), RecomputeGranularity.SELECTIVE),
    }
    for flag, (given, granularity) in belongs.items():
        if given and config.recompute_granularity is not granularity:
            got = "" if config.recompute_granularity is None else f", got {config.recompute_granularity.value}"
            yield f"{flag} is about --recompute-granularity {granularity.value}{got}; give that, or leave it out"
