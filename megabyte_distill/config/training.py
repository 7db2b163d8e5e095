"""The settings of a run beside its stages' own: model, data, checkpoints, parallelism, the run; and all together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum

from megabyte_distill.config.blend import BlendEntry, parse_blend, parse_split
from megabyte_distill.config.engine import EngineConfig
from megabyte_distill.config.model import ByteSideConfig
from megabyte_distill.config.options import option
from megabyte_distill.config.stage import CURRICULUM, STAGE_ORDER, StageConfig

WIDTH_OF_TEACHER = 0
"""Value of ``backbone_width`` that means: whatever the teacher has."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFlags:
    """What the student looks like, apart from what its teacher decides."""

    preset: str = option("tiny", "named set of defaults for the model and every stage", metavar="NAME")
    document_mask: bool = option(True, "documents packed into one row do not see each other; off is the paper's way")
    byte_side: ByteSideConfig = field(default_factory=lambda: ByteSideConfig(backbone_width=WIDTH_OF_TEACHER))

    def byte_side_for(self, teacher_width: int) -> ByteSideConfig:
        """The byte side for a teacher of hidden size E; ValueError where --backbone-width asks for another one."""
        expected = self.byte_side.backbone_width
        if expected not in (WIDTH_OF_TEACHER, teacher_width):
            raise ValueError(
                f"the teacher's hidden size is {teacher_width}, but --preset {self.preset} or --backbone-width "
                f"expects {expected}; choose the preset of this teacher, or --backbone-width {teacher_width}"
            )
        return replace(self.byte_side, backbone_width=teacher_width)


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Where rows come from: one blend cut by ``split``, two blends, or random bytes."""

    data_path: tuple[str, ...] = option(
        (), "data set stem, or a blend: w1 stem1 w2 stem2 …; cut by --split", metavar="STEM"
    )
    data_args_path: str | None = option(
        None, "text file with the words of --data-path, instead of that flag", metavar="FILE"
    )
    split: str | None = option(
        None,
        "shares of each set's documents for training, validation, test; with --data-path, 969,30,1 if not given",
        metavar="SHARES",
    )
    train_data_path: tuple[str, ...] = option(
        (), "stem or blend for training only; needs --valid-data-path", metavar="STEM"
    )
    valid_data_path: tuple[str, ...] = option((), "stem or blend of held-out documents", metavar="STEM")
    mock_data: bool = option(False, "random bytes and tokens instead of data, to try a machine")

    @property
    def blend(self) -> tuple[BlendEntry, ...]:
        """The blend that ``split`` cuts, given or read from a file; empty for separate sets or mock data."""
        return parse_blend(self.data_path)

    @property
    def train_blend(self) -> tuple[BlendEntry, ...]:
        """The blend for training only."""
        return parse_blend(self.train_data_path)

    @property
    def valid_blend(self) -> tuple[BlendEntry, ...]:
        """The held-out blend."""
        return parse_blend(self.valid_data_path)

    @property
    def split_shares(self) -> tuple[float, float, float]:
        """(training, validation, test), summing to 1."""
        return parse_split(self.split)


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """What is read at the start and where the run is written: RUN/<stage>/iter_0000100/."""

    load: str | None = option(None, "a converted teacher, or a run, whose last complete stage is taken", metavar="DIR")
    save: str | None = option(
        None, "folder of the run; started again with the same folder, a run goes on", metavar="DIR"
    )
    ckpt_step: int | None = option(
        None,
        "of the last complete stage of the run that --load names, take this iteration instead of the latest",
        low=1,
    )
    keep_last_checkpoints: int = option(0, "checkpoints that a stage keeps, the newest ones; 0 keeps all", low=0)
    save_retain_interval: int = option(
        0, "updates between checkpoints that are kept beside the newest ones; 0 keeps none", unit="updates", low=0
    )
    async_save: bool = option(False, "write checkpoints beside the training, from a copy in host memory")
    verify_checkpoint: bool = option(
        True, "before loading a checkpoint compare the hash of every file; off compares sizes only"
    )
    no_load_optim: bool = option(False, "go on with a fresh optimizer instead of the checkpoint's")
    no_load_rng: bool = option(False, "go on without the checkpoint's random number state")


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """How the work is spread over ranks."""

    tensor_model_parallel_size: int = option(1, "ranks that share each layer", unit="ranks", low=1)
    pipeline_model_parallel_size: int = option(1, "pipeline stages of the backbone", unit="ranks", low=1)
    num_virtual_stages_per_pipeline_rank: int | None = option(
        None, "virtual pipeline stages that each rank interleaves; none means one", unit="stages", low=1
    )
    num_layers_per_virtual_pipeline_stage: int | None = option(
        None, "the same said by the layers of a virtual stage", unit="layers", low=1
    )
    microbatch_group_size_per_virtual_pipeline_stage: int | None = option(
        None,
        "micro-batches a virtual stage takes before the next one's turn; none means --pipeline-model-parallel-size",
        unit="micro-batches",
        low=1,
    )
    sequence_parallel: bool = option(
        False, "cut the backbone's norms and residual stream over the tensor-parallel ranks, by chunks"
    )
    use_distributed_optimizer: bool = option(False, "shard the optimizer's state over the data-parallel ranks")
    overlap_grad_reduce: bool = option(False, "reduce gradients while the backward pass still runs")
    overlap_param_gather: bool = option(
        False, "gather the backbone's updated weights while the forward pass runs already"
    )
    ddp_bucket_size: int | None = option(
        None,
        "gradients (and weights) that are sent at once where they overlap; none leaves it to megatron",
        unit="parameters",
        low=1,
    )
    distributed_timeout_minutes: float = option(
        10.0, "how long a rank waits for the others before the run ends", unit="minutes", above=0
    )

    @property
    def is_interleaved(self) -> bool:
        """Whether virtual pipeline stages are asked for; by layers they may come to one a rank."""
        return (self.num_virtual_stages_per_pipeline_rank or 1) > 1 or bool(self.num_layers_per_virtual_pipeline_stage)

    def virtual_stages(self, num_layers: int) -> int:
        """Virtual stages of each rank for a backbone whose layers they divide."""
        if self.num_layers_per_virtual_pipeline_stage:
            return num_layers // self.pipeline_model_parallel_size // self.num_layers_per_virtual_pipeline_stage
        return self.num_virtual_stages_per_pipeline_rank or 1

    @property
    def micro_batch_group(self) -> int:
        """Micro-batches that a virtual stage takes before the next one's turn."""
        return self.microbatch_group_size_per_virtual_pipeline_stage or self.pipeline_model_parallel_size

    @property
    def model_parallel_size(self) -> int:
        """Ranks that share one model."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size

    def whole_copies(self, world_size: int) -> int:
        """Copies of the model for which there are ranks; a size of 0, an error named elsewhere, counts as 1."""
        return world_size // max(1, self.model_parallel_size)

    def data_parallel_size(self, world_size: int) -> int:
        """Ranks that see different rows; ValueError where the model-parallel sizes do not divide the world."""
        model = self.model_parallel_size
        if world_size % model:
            raise ValueError(
                f"{world_size} ranks cannot be cut into groups of --tensor-model-parallel-size "
                f"{self.tensor_model_parallel_size} × --pipeline-model-parallel-size "
                f"{self.pipeline_model_parallel_size} = {model}; start a multiple of {model} ranks"
            )
        return world_size // model


class KernelMode(str, Enum):
    """Which implementation the byte side's operators run."""

    AUTO = "auto"
    """The fused kernels on a GPU for which they are built, torch everywhere else."""
    FUSED = "fused"
    """The fused kernels or an error; on a CPU their slow build for tests."""
    REFERENCE = "reference"
    """Torch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """The run itself: which stages, in what precision, how it reports and when it stops."""

    stages: str = option(
        ",".join(CURRICULUM), f"stages to run, of {', '.join(STAGE_ORDER)}, in this order", metavar="STAGES"
    )
    smoke: bool = option(False, "a few small updates a stage, to see that everything works")
    dry_run: bool = option(
        False, "print the resolved settings, parameters and memory per rank, and stop; needs no teacher and no GPU"
    )
    fresh: bool = option(False, "remove what --save holds and start over")
    seed: int = option(1234, "seed of initialisation and of the order of the data", low=0)
    bf16: bool = option(False, "bfloat16 forward and backward with fp32 master weights")
    kernels: KernelMode = option(
        KernelMode.AUTO, "the byte side's operators: fused kernels, torch's (reference), or what fits the device (auto)"
    )
    log_interval: int = option(10, "updates between log lines", unit="updates", low=1)
    log_throughput: bool = option(False, "show TFLOP/s per GPU in the log line, counted on each stage's first update")
    tensorboard_dir: str | None = option(
        None, "folder of tensorboard's events; none means SAVE/tensorboard", metavar="DIR"
    )
    wandb_project: str | None = option(
        None, "also report to this Weights & Biases project (needs the extra wandb)", metavar="PROJECT"
    )
    exit_interval: int | None = option(
        None, "save and stop when the iteration is a multiple of this", unit="updates", low=1
    )
    exit_duration_in_mins: float | None = option(None, "save and stop after this time", unit="minutes", above=0)
    exit_signal_handler: bool = option(True, "on Ctrl-C or SIGTERM finish the update, save and stop")
    summary_bytes: int = option(
        0, "held-out bytes on which the closing summary is measured; 0 writes none", unit="bytes", low=0
    )
    summary_paths: int = option(
        4,
        "K of the summary's figures without a tokenizer (K boundary histories side by side); 0 leaves them out",
        low=0,
    )
    max_nan_iterations: int = option(
        3, "stop at this many updates in a row without a finite loss and gradient", unit="updates", low=1
    )

    check_invariants: int = option(
        0,
        "updates between checks that weights agree over ranks and frozen ones are unchanged; 0 checks never",
        unit="updates",
        low=0,
    )
    rerun_check: int = option(
        0,
        "updates between checks that a second forward and backward pass gives the same bits; 0 checks never",
        unit="updates",
        low=0,
    )

    @property
    def stage_names(self) -> tuple[str, ...]:
        """The names in ``stages``, as given."""
        return tuple(name.strip() for name in self.stages.split(",") if name.strip())


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Everything a run is told, resolved. ``stages`` holds the selected stages in the order in which they run."""

    model: ModelFlags = field(default_factory=ModelFlags)
    data: DataConfig = field(default_factory=DataConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    run: RunConfig = field(default_factory=RunConfig)
    stages: Mapping[str, StageConfig] = field(default_factory=dict)

    @property
    def align_layers(self) -> int:
        """Layers that the backbone's first pipeline stage must have for 1a."""
        return self.stages["1a"].align_layers if "1a" in self.stages else 0
