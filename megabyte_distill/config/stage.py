"""The settings of one stage of the curriculum: each may be given for all stages (``--lr``) or for one (``--2a.lr``)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from megabyte_distill.config.options import option

CURRICULUM = ("1a", "1b", "1c", "2a", "2b")
"""What runs unless ``--stages`` says otherwise, in the order that chains: 1c freezes what 1b still changes."""
STAGE_ORDER = (*CURRICULUM, "3a")
"""Every stage there is, in the order in which they build on each other. A new one's name stands here, in
``CURRICULUM`` if it is no choice, and in the groups below to which it belongs (docs/adding-a-stage.md)."""

CHOOSES_TARGETS = ("2a", "2b")
"""Stages whose byte targets may be the teacher's."""
TRAINS_ALL = ("2b", "3a")
"""Stages in which the router trains beside the bytes, and the backbone unless it is frozen."""
TRAINS_DECODER = ("2a", *TRAINS_ALL)
"""Stages after which the decoder speaks."""
WITH_BACKBONE = ("1b", *TRAINS_DECODER)
"""Stages in which the backbone runs; with --align-layers the first of its layers run in 1a as well."""
RECOMPUTES = ("1a", "1b", *TRAINS_ALL)
"""Stages in which a gradient passes through layers of the backbone."""
MERGES_IN = ("1c", *TRAINS_DECODER)
"""Stages in which a chunk may be several teacher tokens: 1a and 1b compare chunks with tokens, one to one."""
OF_DIALOGUES = ("3a",)
"""Stages whose byte loss is of the answers of dialogues alone, which the data's loss mask marks."""


class BoundarySource(str, Enum):
    """Which boundary bits a stage feeds to chunking and dechunking."""

    GOLD = "gold"
    """The teacher tokenizer's; the same bits that are labels."""
    ROUTER = "router"
    """The router's own, as the paper does; its lookahead reaches the decoder."""


class LrDecayStyle(str, Enum):
    """Shape of the learning rate after warm-up."""

    COSINE = "cosine"
    LINEAR = "linear"
    CONSTANT = "constant"


class ByteTargets(str, Enum):
    """What the next (byte, bit) pair is trained on."""

    HARD = "hard"
    """The text's own byte and gold bit (the paper)."""
    EXACT = "exact"
    """The teacher's exact distribution over the pairs, which its next-token distribution defines."""
    MIXED = "mixed"
    """Both, weighted by --kd-loss-alpha."""


class TargetsFrom(str, Enum):
    """Whose next-token distribution the exact byte targets of 2a are made of."""

    AUTO = "auto"
    """The student's where it tells what the teacher would (curriculum/stages.py), the teacher's elsewhere."""
    TEACHER = "teacher"
    """The teacher's own, which reads the gold tokens beside the student."""
    STUDENT = "student"
    """That of the student's backbone and token head as 1b left them, which read the student's chunks anyway."""


class AlignLossScale(str, Enum):
    """What the squared errors of stage 1a are divided by."""

    MEAN = "mean"
    """Nothing beyond the mean over gold ends and E (the paper)."""
    TABLE_VARIANCE = "table_variance"
    """The variance of the teacher's embedding table as well, behind --align-layers each teacher state's mean square, so
    that clipping means the same for every teacher."""


class RecomputeGranularity(str, Enum):
    """What the backbone forgets in the forward pass and computes again in the backward pass."""

    FULL = "full"
    """Whole layers: only their inputs are kept."""
    SELECTIVE = "selective"
    """The parts of a layer that --recompute-modules names."""


class RecomputeMethod(str, Enum):
    """Which layers --recompute-granularity full is about."""

    UNIFORM = "uniform"
    """All, in groups of --recompute-num-layers of which only the first input is kept."""
    BLOCK = "block"
    """The first --recompute-num-layers of each (virtual) pipeline stage."""


class RecomputeModule(str, Enum):
    """A part of a layer that --recompute-granularity selective forgets.

    megatron's "layernorm" is not among them: without Transformer Engine its code fails.
    """

    CORE_ATTN = "core_attn"
    MLP = "mlp"


@dataclass(frozen=True, kw_only=True, slots=True)
class StageConfig:
    """How one stage trains. Rows are packed rows of ``seq_length`` bytes; learning rates are AdamW's."""

    train_iters: int = option(100, "updates of the stage", unit="updates", low=1)
    seq_length: int = option(4096, "size P of a packed row", unit="bytes", above=1)
    micro_batch_size: int = option(1, "rows a rank takes through one forward and backward", unit="rows", low=1)
    global_batch_size: int = option(4, "rows of one update, over all ranks", unit="rows", low=1)
    chunk_bucket: int = option(
        64, "the number of chunks of a row is padded to a multiple of this", unit="chunks", low=1
    )

    lr: float = option(1e-3, "highest learning rate", low=0)
    min_lr: float | None = option(None, "learning rate at the stage's end; or give --min-lr-ratio", low=0)
    min_lr_ratio: float | None = option(
        None, "the same as a share of --lr (and of --backbone-lr); neither given means 0", low=0, high=1
    )
    lr_decay_style: LrDecayStyle = option(LrDecayStyle.COSINE, "shape of the learning rate after warm-up")
    lr_warmup_fraction: float | None = option(
        None, "share of the updates that warm up; or give --lr-warmup-iters; neither given means none", low=0, high=1
    )
    lr_warmup_iters: int | None = option(None, "updates that warm up", unit="updates", low=0)
    backbone_lr: float | None = option(
        None,
        "highest learning rate of the backbone and its token head; none means --lr; a preset's stays beside --lr",
        low=0,
        stages=("1b", *TRAINS_ALL),
    )
    weight_decay: float = option(0.1, "AdamW's decoupled weight decay", low=0)
    clip_grad: float = option(1.0, "largest norm of the whole gradient; 0 switches clipping off", low=0)
    adam_beta1: float = option(0.9, "decay of AdamW's first moment", low=0, below=1)
    adam_beta2: float = option(0.95, "decay of AdamW's second moment", low=0, below=1)
    adam_eps: float = option(1e-8, "AdamW's epsilon", above=0)

    boundary_source: BoundarySource = option(
        BoundarySource.GOLD, "where the boundary bits come from", stages=TRAINS_DECODER
    )
    target_bytes_per_chunk: float | None = option(
        None,
        "mean length of chunks, reached by merging adjacent teacher tokens; none means the tokens themselves, in 3a "
        "what the stage before left; a length that the tokens have anyway, as 1.01, means them in 3a too",
        unit="bytes",
        above=1,
        high=64,
        stages=MERGES_IN,
    )
    target_bytes_per_chunk_start: float | None = option(
        None,
        "mean length from which --target-bytes-per-chunk-iters begins; none means the teacher's tokens'",
        unit="bytes",
        above=1,
        high=64,
        stages=MERGES_IN,
    )
    target_bytes_per_chunk_iters: int = option(
        0,
        "updates over which the length goes linearly to --target-bytes-per-chunk; 0 means it is that from the start",
        unit="updates",
        low=0,
        stages=MERGES_IN,
    )
    byte_targets: ByteTargets = option(
        ByteTargets.HARD,
        "what the next byte and bit are trained on: the text, the teacher's exact distribution, or both",
        stages=CHOOSES_TARGETS,
    )
    kd_loss_alpha: float = option(
        0.5,
        "weight of the exact targets in --byte-targets mixed; the text has the rest",
        low=0,
        high=1,
        stages=CHOOSES_TARGETS,
    )
    kd_temperature: float = option(
        1.0,
        "temperature T at which student and teacher are compared in --byte-targets exact and mixed; the text's part of "
        "mixed stays at 1",
        above=0,
        stages=CHOOSES_TARGETS,
    )
    exact_targets_from: TargetsFrom = option(
        TargetsFrom.AUTO,
        "whose next-token distribution makes the exact targets: the teacher's, which runs beside the student, or that "
        "of the student's own frozen backbone and token head, which costs no second forward; auto: the latter behind "
        "1a and 1b, where chunks are the teacher's tokens",
        stages=("2a",),
    )
    logits_load_dir: str | None = option(
        None,
        "folder of tools/cache_teacher.py from which the exact targets are read, instead of running the teacher",
        metavar="DIR",
        stages=CHOOSES_TARGETS,
    )
    align_loss_scale: AlignLossScale = option(
        AlignLossScale.TABLE_VARIANCE, "what the alignment errors are divided by", stages=("1a",)
    )
    align_layers: int = option(
        0,
        "the encoder's states are compared with the teacher's behind so many of its first layers as well; 0: not",
        unit="layers",
        low=0,
        stages=("1a",),
    )
    align_layers_loss_weight: float = option(
        1.0, "weight of the error behind --align-layers beside that of the embeddings", low=0, stages=("1a",)
    )
    router_loss_weight: float = option(
        1.0, "weight of the router's BCE beside the byte cross-entropy", low=0, stages=TRAINS_ALL
    )
    freeze_backbone: bool = option(False, "train the byte side through a fixed backbone", stages=("1b", *TRAINS_ALL))
    dialogue_data_path: tuple[str, ...] = option(
        (),
        "dialogues with a loss mask, instead of the run's data: a data set stem, or a blend; cut by --split",
        metavar="STEM",
        stages=OF_DIALOGUES,
    )

    recompute_granularity: RecomputeGranularity | None = option(
        None,
        "what the backbone (in 1a: its --align-layers) computes again in the backward pass instead of keeping it: "
        "whole layers, or parts of them",
        stages=RECOMPUTES,
    )
    recompute_method: RecomputeMethod | None = option(
        None, "which layers --recompute-granularity full is about; none means uniform", stages=RECOMPUTES
    )
    recompute_num_layers: int | None = option(
        None,
        "layers of a group (uniform) or in all (block); none means 1",
        unit="layers",
        low=1,
        stages=RECOMPUTES,
    )
    recompute_modules: tuple[RecomputeModule, ...] = option(
        (), "parts that --recompute-granularity selective is about; none means core_attn", stages=RECOMPUTES
    )

    recompute_byte_mixers: bool = option(
        False,
        "compute the byte side's mixer blocks again in the backward pass instead of keeping what they need for it",
        stages=("1a", "1b", *TRAINS_DECODER),
    )

    eval_interval: int = option(
        100, "evaluate every so many updates; 0 means at the stage's end only", unit="updates", low=0
    )
    eval_iters: int = option(
        4, "global batches of held-out rows an evaluation takes; 0 means no evaluation", unit="batches", low=0
    )
    save_interval: int = option(
        100, "save every so many updates, and always at the stage's end; 0 means there only", unit="updates", low=0
    )

    @property
    def floor_ratio(self) -> float:
        """Lowest learning rate over the highest, in [0, 1]; holds for the backbone's learning rate as well."""
        if self.min_lr is not None:
            return self.min_lr / self.lr if self.lr > 0 else 0.0
        return self.min_lr_ratio if self.min_lr_ratio is not None else 0.0

    @property
    def warmup_iterations(self) -> int:
        """Updates over which the learning rate rises from 0."""
        if self.lr_warmup_iters is not None:
            return self.lr_warmup_iters
        return round((self.lr_warmup_fraction or 0.0) * self.train_iters)

    @property
    def backbone_peak_lr(self) -> float:
        """The backbone's highest learning rate."""
        return self.lr if self.backbone_lr is None else self.backbone_lr

    @property
    def bytes_per_update(self) -> int:
        """Bytes of one update over all ranks, padding included."""
        return self.seq_length * self.global_batch_size

    @property
    def recompute_fields(self) -> dict[str, str | int | list[str]]:
        """Fields of megatron's TransformerConfig that recompute as the settings say; empty where they do not."""
        if self.recompute_granularity is None:
            return {}
        fields: dict[str, str | int | list[str]] = {"recompute_granularity": self.recompute_granularity.value}
        if self.recompute_granularity is RecomputeGranularity.FULL:
            method = self.recompute_method or RecomputeMethod.UNIFORM
            return {
                **fields,
                "recompute_method": method.value,
                "recompute_num_layers": self.recompute_num_layers or 1,
            }
        modules = self.recompute_modules or (RecomputeModule.CORE_ATTN,)
        return {**fields, "recompute_modules": [module.value for module in modules]}

    def micro_batches(self, data_parallel_size: int) -> int:
        """Micro-batches a rank accumulates into one update; ValueError where the sizes do not divide."""
        rows = self.micro_batch_size * data_parallel_size
        if self.global_batch_size % rows:
            raise ValueError(
                f"--global-batch-size {self.global_batch_size} is not a multiple of --micro-batch-size "
                f"{self.micro_batch_size} × {data_parallel_size} data-parallel ranks = {rows}; "
                f"{max(rows, self.global_batch_size // rows * rows)} would be"
            )
        return self.global_batch_size // rows


def runs_backbone(stage: str, config: StageConfig) -> bool:
    """Whether a stage's forward goes through the backbone, or its first layers."""
    return stage in WITH_BACKBONE or (stage == "1a" and config.align_layers > 0)
