"""What becomes of a flag that a Megatron-LM user types: taken, done always, or refused with what to use instead.

docs/megatron-flags.md shows this table; a test keeps the two equal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType


class Fate(str, Enum):
    """What happens to one of Megatron's flags here."""

    SAME = "same"
    """A flag of ours with Megatron's name and meaning."""
    OTHER = "other name"
    """Refused; the words name the flag to use."""
    ALWAYS = "always on"
    """Taken and warned about: it asks for what is done anyway."""
    ABSENT = "not here"
    """Refused; the words say why, or who decides instead."""


@dataclass(frozen=True, slots=True)
class MegatronFlag:
    """Flags of Megatron-LM that share a fate."""

    fate: Fate
    names: tuple[str, ...]
    """Without dashes."""
    words: str
    value: str | None = None
    """The one value with which an ``ALWAYS`` flag says what is done anyway; None for a switch."""

    @property
    def shown(self) -> str:
        """As a user types them."""
        return " ".join(f"`--{name}{'' if self.value is None else ' ' + self.value}`" for name in self.names)


def _same(names: str, words: str) -> MegatronFlag:
    return MegatronFlag(Fate.SAME, tuple(names.split()), words)


def _other(names: str, words: str) -> MegatronFlag:
    return MegatronFlag(Fate.OTHER, tuple(names.split()), words)


def _always(names: str, words: str, value: str | None = None) -> MegatronFlag:
    return MegatronFlag(Fate.ALWAYS, tuple(names.split()), words, value)


def _absent(names: str, words: str) -> MegatronFlag:
    return MegatronFlag(Fate.ABSENT, tuple(names.split()), words)


TABLE: Mapping[str, tuple[MegatronFlag, ...]] = MappingProxyType(
    {
        "Parallelism": (
            _same("tensor-model-parallel-size pipeline-model-parallel-size sequence-parallel", "any T × P × DP"),
            _same("use-distributed-optimizer overlap-grad-reduce ddp-bucket-size distributed-timeout-minutes", ""),
            _same(
                "overlap-param-gather",
                "for the transformer's layers; the byte side, embedding and head are gathered before the forward",
            ),
            _always(
                "context-parallel-size",
                "a row is whole: each segment's chunks would have to divide by 2 × the size; "
                "--tensor-model-parallel-size with --sequence-parallel cuts long rows",
                "1",
            ),
            _other("model-parallel-size", "the old name of --tensor-model-parallel-size"),
            _same(
                "num-virtual-stages-per-pipeline-rank num-layers-per-virtual-pipeline-stage "
                "microbatch-group-size-per-virtual-pipeline-stage",
                "any T × P × V × DP; the byte encoder is on the first virtual stage, the decoder on the last",
            ),
            _other("virtual-pipeline-model-parallel-size", "give --num-virtual-stages-per-pipeline-rank"),
            _absent(
                "no-overlap-p2p-communication overlap-p2p-communication-warmup-flush",
                "virtual pipeline stages send while they compute, but wait where the pipeline fills and empties",
            ),
            _absent(
                "decoder-first-pipeline-num-layers decoder-last-pipeline-num-layers pipeline-model-parallel-layout "
                "account-for-embedding-in-pipeline-split account-for-loss-in-pipeline-split",
                "layers are split evenly; choose a --pipeline-model-parallel-size that divides them",
            ),
            _absent(
                "expert-model-parallel-size expert-tensor-parallel-size num-experts moe-layer-freq "
                "moe-grouped-gemm moe-router-topk moe-token-dispatcher-type moe-aux-loss-coeff",
                "no supported teacher has experts",
            ),
            _absent("cp-comm-type", "there is no context parallelism"),
            _absent(
                "use-torch-fsdp2 use-megatron-fsdp data-parallel-sharding-strategy num-distributed-optimizer-instances",
                "use --use-distributed-optimizer with tensor and pipeline parallelism",
            ),
            _absent("overlap-param-gather-with-optimizer-step", "use --overlap-param-gather"),
            _absent("tp-comm-overlap", "it is Transformer Engine's user buffers, which are not set up"),
            _absent(
                "distributed-backend",
                "NCCL on GPUs beside gloo for the CPU, gloo alone without GPUs: chosen by what is there",
            ),
            _absent("local-rank", "torchrun's environment says it"),
            _absent("use-tp-pp-dp-mapping", "ranks are laid out tensor, data, pipeline, Megatron's default"),
        ),
        "Batches, updates, stopping": (
            _same("micro-batch-size global-batch-size train-iters", "a stage's own with --2a.train-iters"),
            _same("seq-length", "in bytes of a packed row, not tokens"),
            _same("exit-interval exit-duration-in-mins exit-signal-handler seed", ""),
            _other("train-samples", "give --train-iters: samples over --global-batch-size"),
            _other("batch-size", "the old name of --micro-batch-size"),
            _absent(
                "rampup-batch-size step-batch-size-schedule decrease-batch-size-if-needed",
                "the batch is the same from the first update to the last; the curriculum's stages have their own",
            ),
            _absent("exit-signal", "SIGTERM and Ctrl-C both save and stop (--exit-signal-handler)"),
            _absent(
                "max-position-embeddings",
                "the teacher says it; rows count in bytes, and --seq-length sets them",
            ),
            _absent("iterations-to-skip", "a non-finite update is skipped and counted by itself"),
            _absent("manual-gc manual-gc-interval manual-gc-eval", "Python's garbage collection is left as it is"),
            _absent("empty-unused-memory-level", "the allocator's cache is left as it is"),
        ),
        "Learning rate and optimizer": (
            _same("lr min-lr lr-decay-style lr-warmup-iters lr-warmup-fraction", "of all stages, or of one: --2a.lr"),
            _same("weight-decay clip-grad adam-beta1 adam-beta2 adam-eps", ""),
            _absent("lr-decay-iters lr-decay-samples", "the schedule ends with --train-iters"),
            _other("lr-warmup-samples", "give --lr-warmup-iters or --lr-warmup-fraction"),
            _other("decoupled-lr decoupled-min-lr", "give --backbone-lr: byte side and backbone have a rate each"),
            _other("head-lr-mult", "give --backbone-lr: byte side and backbone have a rate each"),
            _other("freeze-all-layers", "give --freeze-backbone"),
            _absent(
                "lr-warmup-init lr-wsd-decay-style lr-wsd-decay-iters lr-wsd-decay-samples",
                "the schedule warms up from 0 and decays by --lr-decay-style",
            ),
            _absent(
                "start-weight-decay end-weight-decay weight-decay-incr-style",
                "weight decay is constant: --weight-decay",
            ),
            _absent(
                "no-weight-decay-cond-type apply-wd-to-qk-layernorm",
                "the recipe decays every trained parameter",
            ),
            _always("override-opt-param-scheduler", "the command line wins over a checkpoint"),
            _absent("use-checkpoint-opt-param-scheduler", "the command line wins over a checkpoint"),
            _always("optimizer", "AdamW, the recipe's", "adam"),
            _absent("sgd-momentum muon-momentum lion-beta1 lion-beta2", "the optimizer is AdamW"),
            _absent(
                "optimizer-cpu-offload optimizer-offload-fraction use-precision-aware-optimizer main-grads-dtype "
                "main-params-dtype exp-avg-dtype exp-avg-sq-dtype",
                "masters, moments and gradients are fp32 on the device; --use-distributed-optimizer shards them",
            ),
        ),
        "Precision": (
            _same("bf16", "bf16 weights, fp32 masters and gradients"),
            _absent(
                "fp16 loss-scale initial-loss-scale min-loss-scale loss-scale-window hysteresis",
                "use --bf16, which needs no loss scale",
            ),
            _always("accumulate-allreduce-grads-in-fp32", "gradients are summed and reduced in fp32"),
            _absent("grad-reduce-in-bf16", "gradients are reduced in fp32"),
            _always("attention-softmax-in-fp32", "attention accumulates in fp32"),
            _same("fp8-format fp8-recipe", "of backbone and teacher, with --transformer-impl transformer_engine"),
            _same(
                "first-last-layers-bf16 num-layers-at-start-in-bf16 num-layers-at-end-in-bf16",
                "not with --fp8-recipe delayed",
            ),
            _absent("fp8-margin fp8-interval fp8-amax-history-len fp8-amax-compute-algo", "megatron-core's defaults"),
            _absent("fp8-param-gather fp8-quantizer-factory", "weights are bf16, scaled to FP8 where they are used"),
            _absent("no-fp8-wgrad", "gradients of weights are FP8 products as well"),
            _absent("fp4-format fp4-recipe fp4-param-gather", "use --fp8-format"),
            _absent("fp16-lm-cross-entropy", "losses are computed in fp32"),
        ),
        "Memory": (
            _same(
                "recompute-granularity recompute-method recompute-num-layers",
                "full without a method means uniform, one layer at a time",
            ),
            _same("recompute-modules", "core_attn and mlp"),
            _other("recompute-activations", "give --recompute-granularity selective"),
            _other("checkpoint-activations", "give --recompute-granularity full"),
            _absent(
                "distribute-saved-activations",
                "--sequence-parallel cuts what is saved between layers already",
            ),
            _absent("cpu-offloading cpu-offloading-num-layers", "use --recompute-granularity full"),
            _absent(
                "cuda-graph-impl enable-cuda-graph external-cuda-graph cuda-graph-scope",
                "rows differ in their number of chunks",
            ),
        ),
        "Data": (
            _same(
                "data-path data-args-path split train-data-path valid-data-path mock-data", "stems of byte data sets"
            ),
            _absent("test-data-path", "a test set is scored by tools/evaluate.py"),
            _absent("per-split-data-args-path", "give --train-data-path and --valid-data-path"),
            _absent("data-cache-path dataloader-fast-cache-load", "no index is built: a data set opens at once"),
            _absent("num-workers dataloader-type", "rows are cut from memory-mapped files in the training process"),
            _always(
                "reset-position-ids reset-attention-mask dataloader-inter-document-masking",
                "documents packed into one row do not see each other; --no-document-mask is the paper's way",
            ),
            _always("no-create-attention-mask-in-dataloader", "attention reads lengths, there is no mask"),
            _absent("eod-mask-loss", "the end of a document is a class of its own, which is learned"),
            _absent("no-mmap-bin-files", "data is memory-mapped"),
            _absent(
                "vocab-file merge-file tokenizer-type tokenizer-model vocab-size make-vocab-size-divisible-by "
                "padded-vocab-size vocab-extra-ids",
                "the converted teacher brings its tokenizer; preprocessing takes --tokenizer-model",
            ),
            _absent("fim-data fim-rate", "documents are learned in their order"),
        ),
        "Checkpoints": (
            _same("save save-interval", "a run goes on from what its --save folder has, without --load"),
            _same("load", "weights alone; optimizer and counters are those of the --save folder"),
            _same("ckpt-step", "of the run that --load names"),
            _same("no-load-optim no-load-rng", "where a run goes on from --save"),
            _same("save-retain-interval", "beside --keep-last-checkpoints, without which all are kept"),
            _same("async-save", "from a copy in host memory, by a thread; the end of a stage waits for it"),
            _absent(
                "async-strategy use-persistent-ckpt-worker",
                "--async-save has one way: a thread writes, which ends with its process",
            ),
            _always("verify-integrity", "sizes and hashes are compared before loading (--no-verify-checkpoint)"),
            _other("finetune", "give --load RUN with another --save: its weights, a fresh optimizer and counters"),
            _other("pretrained-checkpoint", "give --load"),
            _other("most-recent-k", "give --keep-last-checkpoints"),
            _always("use-dist-ckpt auto-detect-ckpt-format", "checkpoints are megatron's torch_dist"),
            _always("ckpt-format dist-ckpt-format", "checkpoints are megatron's torch_dist", "torch_dist"),
            _absent("no-save-optim no-save-rng", "a checkpoint is complete; --no-load-optim leaves it unread"),
            _absent(
                "use-checkpoint-args use-mp-args-from-checkpoint-args",
                "the model's shape always comes from the checkpoint, the rest from the command line",
            ),
            _always("exit-on-missing-checkpoint", "a --load without a checkpoint ends with an error"),
            _absent(
                "ckpt-convert-format ckpt-convert-save",
                "tools/convert_checkpoint.py imports and exports",
            ),
            _absent(
                "non-persistent-save-interval non-persistent-ckpt-type",
                "there is one kind of checkpoint; --keep-last-checkpoints bounds the space",
            ),
            _absent(
                "dist-ckpt-strictness ckpt-assume-constant-structure ckpt-fully-parallel-load",
                "every key must be there, and every rank reads its own shards",
            ),
        ),
        "Evaluation, log, profiling": (
            _same("eval-interval eval-iters", "--eval-interval 0 evaluates at a stage's end"),
            _same("log-interval tensorboard-dir wandb-project", ""),
            _same("log-throughput", "operations are counted while a stage's first update runs, recomputation included"),
            _other("skip-train", "give tools/evaluate.py --load RUN"),
            _absent("full-validation multiple-validation-sets", "--eval-iters batches of the held-out blend"),
            _absent("wandb-exp-name wandb-save-dir wandb-entity", "wandb's own environment sets them (WANDB_NAME, …)"),
            _always("log-progress", "metrics.jsonl keeps every logged value"),
            _absent("log-params-norm log-num-zeros-in-grad log-memory-to-tensorboard", "not measured"),
            _absent(
                "log-timers-to-tensorboard timing-log-level timing-log-option log-straggler",
                "the log line has the time of an update; use a profiler for its parts",
            ),
            _absent(
                "profile profile-step-start profile-step-end profile-ranks use-pytorch-profiler record-memory-history",
                "start the job under nsys, or torch.profiler around pretrain.main",
            ),
            _absent(
                "check-for-nan-in-loss-and-grad no-check-for-nan-in-loss-and-grad check-for-spiky-loss",
                "non-finite losses and gradients always skip the update; see --max-nan-iterations",
            ),
            _other("check-weight-hash-across-dp-replicas-interval", "give --check-invariants N"),
            _other("rerun-mode", "give --rerun-check N"),
        ),
        "Model and kernels": (
            _absent(
                "num-layers hidden-size ffn-hidden-size num-attention-heads group-query-attention num-query-groups "
                "kv-channels normalization norm-epsilon swiglu squared-relu position-embedding-type rotary-base "
                "rotary-percent use-rope-scaling rope-scaling-factor qk-layernorm untie-embeddings-and-output-weights "
                "add-qkv-bias window-size spec",
                "the converted teacher says it (model_config.json); sizes of the byte side have flags of their own",
            ),
            _always("attention-dropout hidden-dropout", "the recipe has no dropout", "0.0"),
            _always("disable-bias-linear", "as in the supported teachers"),
            _absent("init-method-std", "the backbone starts from the teacher, the byte side from PyTorch's defaults"),
            _always("use-mcore-models", "the backbone is megatron-core's"),
            _always("use-flash-attn", "packed attention takes PyTorch's fused kernels"),
            _same("transformer-impl", "local or transformer_engine; see docs/transformer-engine.md"),
            _absent(
                "no-masked-softmax-fusion no-bias-gelu-fusion no-bias-swiglu-fusion no-bias-dropout-fusion "
                "no-rope-fusion no-persist-layer-norm",
                "the layers have no such fusion to switch off",
            ),
            _always("no-gradient-accumulation-fusion", "gradients are accumulated by megatron's DDP"),
            _absent("cross-entropy-loss-fusion cross-entropy-fusion-impl", "the losses are this package's own"),
            _same("logits-load-dir", "the teacher's exact byte targets, stored; in 2a and 2b"),
            _other("logits-save-dir logits-save-top-k", "give it to tools/cache_teacher.py"),
            _other("logits-load-kd-loss-alpha", "give --kd-loss-alpha"),
            _absent("multi-latent-attention mtp-num-layers hybrid-layer-pattern", "no supported teacher has them"),
        ),
    }
)
"""By section of the documentation page."""

_BY_NAME: Mapping[str, MegatronFlag] = MappingProxyType(
    {name: row for rows in TABLE.values() for row in rows for name in row.names if row.fate is not Fate.SAME}
)


def find_megatron_flag(name: str) -> MegatronFlag | None:
    """What the table says of a flag (without dashes) that is not one of ours; None where it is silent."""
    return _BY_NAME.get(name.replace("_", "-"))


def answer(name: str, row: MegatronFlag, words: Sequence[str]) -> tuple[str | None, str | None]:
    """(problem, warning), one of them, for Megatron's flag ``name`` given with ``words``."""
    if row.fate is Fate.ALWAYS:
        if list(words) == ([] if row.value is None else [row.value]):
            return None, f"--{name} changes nothing: {row.words}"
        got = " ".join(words) or "no value"
        return f"--{name}: got {got}, expected {row.value or 'no value'} ({row.words}); or leave it out", None
    kind = "is Megatron's, and has another name here" if row.fate is Fate.OTHER else "is Megatron's, and not taken here"
    return f"--{name} {kind}: {row.words}", None


def markdown() -> str:
    """The tables of docs/megatron-flags.md."""
    lines: list[str] = []
    for title, rows in TABLE.items():
        lines += [f"## {title}", "", "| Megatron's flag | here | |", "|---|---|---|"]
        lines += [f"| {row.shown} | {row.fate.value} | {row.words} |" for row in rows]
        lines.append("")
    return "\n".join(lines)
