"""megatron's DDP and optimizer around a model of which a part is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import megatron.core.optimizer as megatron_optimizer
import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from megatron.core.optimizer.optimizer_config import ParamKey
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import ModelType
from torch import nn

from megabyte_distill.config.stage import StageConfig
from megabyte_distill.parallel.pipeline import pipeline_place, trains_on_stages, virtual_stages
from megabyte_distill.parallel.positions import Position
from megabyte_distill.training import distributed_adam
from megabyte_distill.training.schedule import learning_rate_factor

BACKBONE_PARAMETERS = "*backbone.*"
LAYER_PARAMETERS = "backbone.decoder."
BACKBONE_GROUP = {"lr_mult": 2.0}
"""A mark, not a factor: megatron tells the groups of a checkpoint apart by their multipliers, and nothing here scales
by them. Without it the backbone's group would be reloaded as a copy of the other one."""
OPTIMIZER_FORMAT = {"distrib_optim_sharding_type": "fully_reshardable"}
"""Of the distributed optimizer's state; its default cannot be saved any more."""
_MASTERS = "fp32_from_fp16_params"
"""Entry of megatron's state under bf16 without the distributed optimizer: fp32 weights, group by group. A pipeline
stage may have groups without parameters, which are left out: dist_checkpointing drops empty lists, and places shift."""
_SETTINGS_OF_A_GROUP = ("max_lr", "min_lr", "weight_decay", "betas", "eps")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerModel:
    """A model wrapped for training with the optimizer of its trainable parameters."""

    module: nn.Module
    """The bare model."""
    parts: Sequence[DistributedDataParallel]
    """The model's parts on this rank, one a virtual stage, each in megatron's wrapper."""
    optimizer: Any
    config: StageConfig
    gradient_arrives: Sequence[bool]
    """Of each part: whether anything trains on the pipeline stages before it."""
    position: Position
    """Told at which part of an update this rank is."""

    def set_learning_rate(self, iteration: int) -> float:
        """Set every group's learning rate for this update; return the highest."""
        factor = learning_rate_factor(self.config, iteration)
        rates: list[float] = []
        for group in self.optimizer.param_groups:
            group["lr"] = group["max_lr"] * factor
            rates.append(group["lr"])
        return max(rates)

    @contextmanager
    def _own_settings(self) -> Iterator[None]:
        before = [{name: group[name] for name in _SETTINGS_OF_A_GROUP if name in group} for group in self._groups()]
        yield
        for group, own in zip(self._groups(), before, strict=True):
            group.update(own)

    def _groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups  # type: ignore[no-any-return]

    def sharded_state_dict(self, weights: dict[str, Any], *, is_loading: bool) -> Any:
        """megatron's description of the optimizer's state, beside that of the model's weights."""
        exact = self._distributed_over_torch()
        if not exact:
            state = self.optimizer.sharded_state_dict(weights, is_loading=is_loading, metadata=OPTIMIZER_FORMAT)
            if not is_loading:
                _share_step(state)
            masters = [group for group in state.pop(_MASTERS, []) if group]
            return {**state, _MASTERS: masters} if masters else state
        [part] = exact
        return distributed_adam.describe(part, weights, is_loading=is_loading, metadata=OPTIMIZER_FORMAT)

    def gather_parameters(self) -> None:
        """Under --overlap-param-gather the last update is whole only in the next forward; this makes it so at once."""
        for part in self.parts:
            if part.ddp_config.overlap_param_gather:
                part.start_param_sync(force_sync=True)

    def zero_grad_buffers(self) -> None:
        """Forget the gradients that were added up."""
        for part in self.parts:
            part.zero_grad_buffer()

    def load_state_dict(self, loaded: Any) -> None:
        """Take up what a checkpoint held of :meth:`sharded_state_dict`, but for what the command line says now."""
        exact = self._distributed_over_torch()
        with self._own_settings():
            if exact:
                [part] = exact
                distributed_adam.load_state(part, loaded)
            else:
                self.optimizer.load_state_dict(self._with_empty_groups(loaded))

    def _with_empty_groups(self, loaded: dict[str, Any]) -> dict[str, Any]:
        """megatron pairs masters with groups by their place."""
        if not isinstance(self._optimizers()[0], Float16OptimizerWithFloat16Params):
            return loaded
        stored = iter(loaded.get(_MASTERS, []))
        return {**loaded, _MASTERS: [next(stored) if group["params"] else [] for group in self._groups()]}

    @property
    def is_distributed(self) -> bool:
        """True where megatron's distributed optimizer holds the state."""
        return bool(self._distributed_optimizers())

    def _distributed_optimizers(self) -> list[Any]:
        return [part for part in self._optimizers() if isinstance(part, DistributedOptimizer)]

    def _optimizers(self) -> list[Any]:
        """megatron's optimizers, one for each kind of parameters; here there is one kind."""
        return getattr(self.optimizer, "chained_optimizers", [self.optimizer])

    def _distributed_over_torch(self) -> list[Any]:
        return [part for part in self._distributed_optimizers() if distributed_adam.is_over_torch(part)]


def _share_step(state: dict[str, Any]) -> None:
    """Give every rank the step count of those with parameters: a checkpoint keeps the main rank's. Collective."""
    own = state.get("optimizer", state)["state"]
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, own.get("common_step"))
    steps = [step for step in everywhere if step is not None]
    if steps:
        own["common_step"] = steps[0]


def _finalizer(position: Position) -> Callable[..., None]:
    """Reduces gradients; the loss was divided by the global count before the backward, so nothing is scaled here."""

    def finalize(model: list[nn.Module], num_tokens: torch.Tensor | None = None, **kwargs: Any) -> None:
        position.at("reduce")
        finalize_model_grads(model, None, **kwargs)

    return finalize


def _without_sync(parts: Sequence[DistributedDataParallel]) -> Callable[[], AbstractContextManager[None]]:
    @contextmanager
    def no_sync() -> Iterator[None]:
        with ExitStack() as stack:
            for part in parts:
                stack.enter_context(part.no_sync())
            yield

    return no_sync


def _gather_before_forward(ddp: DistributedDataParallel) -> None:
    """Let an update's first forward wait for all weights but the transformer layers'.

    megatron waits where a module is called; the byte side, the embedding and the token head are also read by name.
    """
    early = {
        id(group): group
        for name, parameter in trainable_parameters(ddp.module)
        if LAYER_PARAMETERS not in name
        for group in [ddp.param_to_bucket_group[parameter]]
    }

    def gather(*_: Any) -> None:
        for group in early.values():
            group.finish_param_sync()

    ddp.register_forward_pre_hook(gather)


def trainable_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and parameters that the stage trains."""
    return ((name, p) for name, p in module.named_parameters() if p.requires_grad)


def _wrapped(
    module: nn.Module, transformer: TransformerConfig, ddp_config: DistributedDataParallelConfig
) -> list[DistributedDataParallel]:
    """Each part of the model in megatron's DDP."""
    parts: list[DistributedDataParallel] = []
    for part in virtual_stages(module):
        part.model_type = ModelType.encoder_or_decoder
        # Megatron's choice: a later virtual stage's gradients are reduced beside the others' computing as they are
        parts.append(DistributedDataParallel(transformer, ddp_config, part, disable_bucketing=bool(parts)))
        if ddp_config.overlap_param_gather:
            _gather_before_forward(parts[-1])
    transformer.no_sync_func = _without_sync(parts) if ddp_config.overlap_grad_reduce else None
    return parts


def wrap_for_training(
    module: nn.Module,
    transformer: TransformerConfig,
    config: StageConfig,
    *,
    bf16: bool = False,
    use_distributed_optimizer: bool = False,
    overlap_grad_reduce: bool = False,
    overlap_param_gather: bool = False,
    ddp_bucket_size: int | None = None,
    use_gloo_process_groups: bool = True,
    position: Position | None = None,
) -> TrainerModel:
    """DDP and AdamW over the parameters with ``requires_grad``; frozen ones get no gradient buffer and no state.

    ``module``: a model, or its :class:`VirtualStages`; ``transformer``: the config that its (first) part holds. The
    optimizer class is megatron's choice: Transformer Engine's FusedAdam, NVIDIA apex's, torch's AdamW. Weight decay
    applies to every trained parameter, as the paper's does; parameters named ``backbone.*`` take ``backbone_peak_lr``.
    """
    trains = trains_on_stages(module)
    if not any(trains):
        raise ValueError("no parameter of the model is trainable: nothing to optimise")
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=use_distributed_optimizer,
        overlap_grad_reduce=overlap_grad_reduce,
        overlap_param_gather=overlap_param_gather,
        bucket_size=ddp_bucket_size,
    )
    position = position or Position()
    transformer.finalize_model_grads_func = _finalizer(position)
    parts = _wrapped(module, transformer, ddp_config)
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
        overlap_param_gather=overlap_param_gather,
    )
    # given (even empty), not None, or megatron would exempt norms and biases from weight decay
    overrides = {ParamKey(name=BACKBONE_PARAMETERS): {"max_lr": config.backbone_peak_lr, **BACKBONE_GROUP}}
    optimizer = megatron_optimizer.get_megatron_optimizer(
        optimizer_config, parts, config_overrides=overrides, use_gloo_process_groups=use_gloo_process_groups
    )
    arrives = [any(trains[: pipeline_place(number)]) for number in range(len(parts))]
    trained = TrainerModel(
        module=module, parts=parts, optimizer=optimizer, config=config, gradient_arrives=arrives, position=position
    )
    for part in trained._distributed_over_torch():
        distributed_adam.allocate_state(part)
    return trained
