"""Named defaults, as data: sizes of the byte side and hyperparameters of the stages. Flags go over them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from megabyte_distill.config.layers import Layer
from megabyte_distill.config.model import ByteMixer, DechunkMode, RouterKind
from megabyte_distill.config.stage import AlignLossScale, BoundarySource, ByteTargets

# the paper's batch: 131,072 × 16 = 8,192 × 256 = 2,097,152 bytes an update.
_LONG_ROWS: Mapping[str, Any] = {"seq_length": 131_072, "global_batch_size": 16, "micro_batch_size": 1}
_SHORT_ROWS: Mapping[str, Any] = {"seq_length": 8_192, "global_batch_size": 256, "micro_batch_size": 1}
_PAPER_COMMON: Mapping[str, Any] = {
    "train_iters": 5_000,
    "weight_decay": 0.1,
    "clip_grad": 1.0,
    "adam_beta1": 0.9,
    "adam_beta2": 0.95,
    "chunk_bucket": 256,
    "bf16": True,
    "eval_interval": 500,
    "eval_iters": 4,
    "save_interval": 500,
}
_PAPER_STAGES: Mapping[str, Mapping[str, Any]] = {
    "1a": {**_LONG_ROWS, "lr": 1e-3, "lr_warmup_fraction": 0.2, "min_lr_ratio": 0.0},
    "1b": {**_SHORT_ROWS, "lr": 2e-5, "lr_warmup_fraction": 0.01, "min_lr_ratio": 0.1},
    "1c": {**_LONG_ROWS, "lr": 1e-3, "lr_warmup_fraction": 0.1, "min_lr_ratio": 0.1},
    "2a": {**_LONG_ROWS, "lr": 1e-3, "lr_warmup_fraction": 0.1, "min_lr_ratio": 0.1},
    "2b": {
        **_SHORT_ROWS,
        "lr": 4e-5,
        "backbone_lr": 2e-5,
        "lr_warmup_fraction": 0.01,
        "min_lr_ratio": 0.1,
        "router_loss_weight": 1.0,
    },
    # not the paper's: an eighth of 2b's bytes an update, since dialogues are few, at half its learning rates
    "3a": {
        **_SHORT_ROWS,
        "global_batch_size": 32,
        "train_iters": 1_000,
        "lr": 2e-5,
        "backbone_lr": 1e-5,
        "lr_warmup_fraction": 0.03,
        "min_lr_ratio": 0.1,
        "router_loss_weight": 1.0,
    },
}
_PAPER_WIDTHS: Mapping[str, Any] = {
    "byte_width": 1536,
    "byte_mixer": ByteMixer.MAMBA2,
    "encoder_layers": 4,
    "decoder_layers": 4,
    "encoder_ffn_hidden_size": 4096,
    "decoder_ffn_hidden_size": 4096,
    "router": RouterKind.OFFICIAL,
    "router_hidden_size": 8192,
    "mamba_state_dim": 128,
    "mamba_head_dim": 64,
    "mamba_expand": 2,
    "mamba_conv_kernel": 4,
    "mamba_scan_chunk": 256,
    "norm_eps": 1e-5,
}
_PAPER_BEHAVIOUR: Mapping[str, Any] = {
    "dechunk_mode": DechunkMode.OFFICIAL,
    "document_mask": False,
    "boundary_source": BoundarySource.ROUTER,
    "byte_targets": ByteTargets.HARD,
    "align_loss_scale": AlignLossScale.MEAN,
    "freeze_backbone": False,
}


def _published(backbone_width: int) -> Layer:
    """The paper's sizes and learning rates for a teacher of hidden size E, with this package's safer behaviour."""
    # exact targets of 2a come from the student's own backbone, which runs anyway; in 2b they would take a teacher
    decoder_sft = {**_PAPER_STAGES["2a"], "byte_targets": ByteTargets.EXACT}
    return Layer(
        common={**_PAPER_COMMON, **_PAPER_WIDTHS, "backbone_width": backbone_width},
        stages={**_PAPER_STAGES, "2a": decoder_sft},
    )


_TINY = Layer(
    common={
        "byte_width": 128,
        "byte_mixer": ByteMixer.CONV,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_ffn_hidden_size": 1024,
        "decoder_ffn_hidden_size": 384,
        "router_hidden_size": 512,
        "conv_ffn_hidden_size": 256,
        "conv_dilations": (1, 4),
        "mamba_state_dim": 64,
        "mamba_head_dim": 32,
        "mamba_scan_chunk": 64,
        "byte_attention_head_dim": 32,
        "seq_length": 2048,
        # small batches: at this size an update costs the same per byte, and quality is bought by updates
        "micro_batch_size": 2,
        "global_batch_size": 2,
        "chunk_bucket": 64,
        "lr_warmup_fraction": 0.05,
        "min_lr_ratio": 0.02,
        "eval_interval": 0,
        "eval_iters": 16,
        "save_interval": 400,
        "log_interval": 50,
        "summary_bytes": 150_000,
    },
    stages={
        "1a": {"lr": 6e-3, "train_iters": 1500, "seq_length": 1024, "min_lr_ratio": 0.0},
        "1b": {"lr": 6e-4, "train_iters": 200},
        "1c": {"lr": 4e-3, "train_iters": 450, "seq_length": 1024},
        "2a": {"lr": 5e-3, "train_iters": 1650, "seq_length": 1024, "byte_targets": ByteTargets.EXACT},
        "2b": {"lr": 1e-3, "backbone_lr": 3e-4, "train_iters": 100, "byte_targets": ByteTargets.EXACT},
        "3a": {"lr": 5e-4, "backbone_lr": 2e-4, "train_iters": 100},
    },
)

PRESETS: Mapping[str, Layer] = MappingProxyType(
    {
        "tiny": _TINY,
        "official": Layer(common={**_PAPER_COMMON, **_PAPER_WIDTHS, **_PAPER_BEHAVIOUR}, stages=_PAPER_STAGES),
        "llama3.2-3b": _published(3072),
        "qwen3-4b": _published(2560),
        "olmo2-1b": _published(2048),
        "llama3.1-8b": _published(4096),
        "gemma3-1b": _published(1152),
    }
)
"""By name: ``official`` is the paper's recipe (docs/architecture.md says where it cannot be); the model presets take
its numbers with gold bits, hard dechunk, document masks and, in 2a, exact targets."""

SMOKE = Layer(
    common={
        "train_iters": 6,
        "seq_length": 512,
        "global_batch_size": 2,
        "micro_batch_size": 1,
        "eval_interval": 3,
        "eval_iters": 1,
        "save_interval": 3,
        "log_interval": 1,
        "lr_warmup_fraction": 0.2,
        "summary_bytes": 4096,
    }
)
"""Goes over the preset with ``--smoke``: the same model, a few short updates."""
