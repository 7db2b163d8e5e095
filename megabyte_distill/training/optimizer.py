"""megatron's DDP and optimizer around a model of which a part is trained."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import megatron.core.optimizer as megatron_optimizer
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig
from megatron.core.optimizer.optimizer_config import ParamKey
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import ModelType
from torch import nn

from megabyte_distill.config.stage import StageConfig
from megabyte_distill.training.schedule import learning_rate_factor

BACKBONE_PARAMETERS = "*backbone.*"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerModel:
    """A model wrapped for training with the optimizer of its trainable parameters."""

    ddp: DistributedDataParallel
    optimizer: Any
    config: StageConfig

    @property
    def module(self) -> nn.Module:
        """The bare model."""
        return self.ddp.module  # type: ignore[no-any-return]

    def set_learning_rate(self, iteration: int) -> float:
        """Set every group's learning rate for this update; return the highest."""
        factor = learning_rate_factor(self.config, iteration)
        rates = []
        for group in self.optimizer.param_groups:
            group["lr"] = group["max_lr"] * factor
            rates.append(group["lr"])
        return max(rates)


def _finalize_without_rescaling(model: list[nn.Module], num_tokens: torch.Tensor | None = None, **kwargs: Any) -> None:
    """Reduce gradients; the loss was divided by the global count before the backward, so nothing is scaled here."""
    finalize_model_grads(model, None, **kwargs)


def trainable_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and parameters that the stage trains."""
    return ((name, p) for name, p in module.named_parameters() if p.requires_grad)


def wrap_for_training(
    module: nn.Module,
    transformer: TransformerConfig,
    config: StageConfig,
    *,
    bf16: bool = False,
    use_distributed_optimizer: bool = False,
    overlap_grad_reduce: bool = False,
) -> TrainerModel:
    """DDP and AdamW over the parameters with ``requires_grad``; frozen ones get no gradient buffer and no state.

    The optimizer class is megatron's choice: Transformer Engine's FusedAdam, NVIDIA apex's, torch's AdamW. Weight decay
    applies to every trained parameter (RECIPE section 3); parameters named ``backbone.*`` take ``backbone_peak_lr``.
    """
    if not any(True for _ in trainable_parameters(module)):
        raise ValueError("no parameter of the model is trainable: nothing to optimise")
    module.model_type = ModelType.encoder_or_decoder  # type: ignore[assignment]
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=use_distributed_optimizer,
        overlap_grad_reduce=overlap_grad_reduce,
    )
    transformer.finalize_model_grads_func = _finalize_without_rescaling
    ddp = DistributedDataParallel(transformer, ddp_config, module)
    transformer.no_sync_func = ddp.no_sync if overlap_grad_reduce else None
    optimizer_config = OptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        min_lr=0.0,
        weight_decay=config.weight_decay,
        adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2,
        adam_eps=config.adam_eps,
        clip_grad=config.clip_grad,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=use_distributed_optimizer,
    )
    overrides = {ParamKey(name=BACKBONE_PARAMETERS): {"max_lr": config.backbone_peak_lr}}
    # an empty mapping (not None) keeps megatron from exempting norms and biases from weight decay
    chosen = overrides if config.backbone_peak_lr != config.lr else {}
    optimizer = megatron_optimizer.get_megatron_optimizer(optimizer_config, [ddp], config_overrides=chosen)
    return TrainerModel(ddp=ddp, optimizer=optimizer, config=config)
