"""megatron-core's layers in the shapes that teachers have: norms before or behind a branch, on queries and keys."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_mlp_module_spec_for_backend
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_block import (
    TransformerBlock,
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from megabyte_distill.config.model import BackboneConfig, QkNorm
from megabyte_distill.kernels.ops import accumulation_dtype
from megabyte_distill.model.attention import SegmentAttention
from megabyte_distill.model.normalization import TeacherRMSNorm, multiplier
from megabyte_distill.model.parallel_linears import total_over_ranks
from megabyte_distill.model.step_layers import StepLayer

_CUT_ALONG = {
    tensor_parallel.VocabParallelEmbedding: 0,
    tensor_parallel.ColumnParallelLinear: 0,
    tensor_parallel.RowParallelLinear: 1,
}


class HeadRMSNorm(TeacherRMSNorm):
    """RMSNorm of each head [.., head_dim]; a replica on each tensor-parallel rank, whose gradients megatron adds up."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, zero_centred=config.layernorm_zero_centered_gamma)


class BackboneRMSNorm(HeadRMSNorm):
    """RMSNorm for the local spec that is allowed under sequence parallelism (megatron reads the attribute)."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(config, hidden_size, eps=eps)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class FullRMSNorm(torch.nn.Module):
    """RMSNorm over all heads together, [S, B, heads of this rank, head_dim]; its weight is cut like the heads."""

    heads: str
    """Field of TransformerConfig with their number."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        assert not config.layernorm_zero_centered_gamma, "no known family has both"
        heads, head_dim, ranks = getattr(config, self.heads), hidden_size, config.tensor_model_parallel_size
        if heads % ranks:
            raise ValueError(
                f"a norm over all {heads} heads of queries or keys together cannot be cut over "
                f"--tensor-model-parallel-size {ranks}; choose a size that divides them"
            )
        self.weight = torch.nn.Parameter(torch.ones(heads // ranks, head_dim))
        tensor_parallel.set_tensor_model_parallel_attributes(self.weight, True, 0, 1)
        self._eps, self._features, self._is_cut = eps, heads * head_dim, ranks > 1

    def forward(self, x: Tensor) -> Tensor:
        if not self._is_cut:  # torch has one kernel for it
            normed: Tensor = F.rms_norm(x.flatten(-2), (self._features,), self.weight.flatten(), self._eps)
            return normed.view_as(x)
        wide = x.to(accumulation_dtype(x.dtype))
        squares = total_over_ranks(wide.square().sum((-2, -1), keepdim=True))
        return (wide * torch.rsqrt(squares / self._features + self._eps) * self.weight).type_as(x)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: Any = None
    ) -> dict[str, Any]:
        """megatron's."""
        state: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True), prefix, {"weight": 0}, sharded_offsets
        )
        return state


class FullQueryNorm(FullRMSNorm):
    """Of queries."""

    heads = "num_attention_heads"


class FullKeyNorm(FullRMSNorm):
    """Of keys."""

    heads = "num_query_groups"


class PostNormLayer(TransformerLayer):  # type: ignore[misc]
    """x + norm(f(x)) for attention and MLP: the norms act where a branch is added to the residual.

    Others may stand in front (Gemma 3) or not (OLMo 2 and 3): they are the spec's, as in any layer.
    """

    def __init__(self, config: TransformerConfig, *arguments: Any, norm: Callable[..., Any], **options: Any) -> None:
        super().__init__(config, *arguments, **options)
        self.post_attention_norm = norm(config, config.hidden_size, config.layernorm_epsilon)
        self.post_mlp_norm = norm(config, config.hidden_size, config.layernorm_epsilon)
        # stand-ins for megatron's bias-dropout-add; bound methods, so that a copy of the layer has its own norms
        self.self_attn_bda, self.mlp_bda = self._add_attention, self._add_mlp

    def _add_attention(self, training: bool, fused: bool) -> Callable[..., Tensor]:
        return functools.partial(_add_normed, self.post_attention_norm)

    def _add_mlp(self, training: bool, fused: bool) -> Callable[..., Tensor]:
        return functools.partial(_add_normed, self.post_mlp_norm)


def _add_normed(
    norm: torch.nn.Module, branch_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, probability: float
) -> Tensor:
    branch, bias = branch_with_bias
    assert bias is None and probability == 0.0  # there is neither bias nor dropout
    summed: Tensor = residual + norm(branch)
    return summed


def mark_parallel_parameters(module: torch.nn.Module) -> None:
    """Says how each parameter is cut by tensor parallelism; megatron says it only of those it initialises."""
    for part in module.modules():
        for kind, dimension in _CUT_ALONG.items():
            if isinstance(part, kind):
                for name, parameter in part.named_parameters(recurse=False):
                    if not hasattr(parameter, "tensor_model_parallel"):
                        along = 0 if name == "bias" else dimension
                        tensor_parallel.set_tensor_model_parallel_attributes(parameter, True, along, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerParts:
    """What a backbone's layers are put together from; the methods are those that megatron asks of a backend."""

    column: Any
    """Linear layer cut along its outputs."""
    norm_column: Any
    """The same with the norm in front of it inside; None where norms are layers of their own."""
    row: Any
    """Linear layer cut along its inputs."""
    norm: Any
    """RMSNorm over E."""
    head_norm: Any
    """RMSNorm over each head."""
    core_attention: ModuleSpec
    turns_by_angles: bool = False
    """Whether the core attention takes its positions as angles (``PackedSegments.angles``)."""
    gate: Callable[[Tensor], Tensor] | None = None
    """The MLP's gate in one kernel, [.., 2 F] → [.., F]; None leaves it to megatron's MLP."""

    def column_parallel_linear(self) -> Any:
        return self.column

    def column_parallel_layer_norm_linear(self) -> Any:
        return self.norm_column

    def fuse_layernorm_and_linear(self) -> bool:
        return self.norm_column is not None

    def row_parallel_linear(self) -> Any:
        return self.row

    def without_inner_norm(self) -> LayerParts:
        """For layers without a norm in front of their branches."""
        return replace(self, norm_column=None)


def local_parts(backbone: BackboneConfig) -> LayerParts:
    """megatron-core's own linear layers with our norms and our packed core attention."""
    return LayerParts(
        column=tensor_parallel.ColumnParallelLinear,
        norm_column=None,
        row=tensor_parallel.RowParallelLinear,
        norm=BackboneRMSNorm,
        head_norm=HeadRMSNorm,
        core_attention=ModuleSpec(module=SegmentAttention, params={"backbone": backbone}),
    )


def block_spec(
    config: TransformerConfig, backbone: BackboneConfig, parts: LayerParts, vp_stage: int
) -> TransformerBlockSubmodules:
    """A pipeline stage's layers from ``parts``; the final norm is a field of the block's spec.

    Whatever the parts, a checkpoint holds the same keys: a norm of its own is stored under the name that it has inside
    a linear layer (megatron's ``sharded_state_dict_keys_map``, which the local spec carries).
    """
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    norm = final_norm = parts.norm
    if backbone.norm_names.behind_attention is not None:
        spec.module, spec.params = PostNormLayer, {**spec.params, "norm": parts.norm}
    if backbone.norm_names.before_attention is None:
        parts, norm = parts.without_inner_norm(), IdentityOp
    elif parts.norm_column is not None:
        norm = IdentityOp
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = norm
    spec.submodules.mlp = get_mlp_module_spec_for_backend(backend=parts)
    attention = spec.submodules.self_attention.submodules
    attention.linear_qkv = parts.norm_column or parts.column
    attention.linear_proj = parts.row
    attention.core_attention = parts.core_attention
    if backbone.qk_norm is QkNorm.HEAD:
        attention.q_layernorm = attention.k_layernorm = parts.head_norm
    elif backbone.qk_norm is QkNorm.FULL:
        attention.q_layernorm, attention.k_layernorm = FullQueryNorm, FullKeyNorm
    layers = get_num_layers_to_build(config, vp_stage)
    return TransformerBlockSubmodules(layer_specs=[spec] * layers, layer_norm=final_norm)


def leading_block(block: TransformerBlock, count: int) -> TransformerBlock:
    """A block of the first ``count`` layers of another, which are the same modules, without a final norm.

    ValueError where it has fewer.
    """
    if count > len(block.layers):
        raise ValueError(f"the first {count} layers were asked for, this pipeline stage has {len(block.layers)}")
    part = copy.copy(block)
    part._modules = {**block._modules, "layers": block.layers[:count], "final_layernorm": None}
    part.num_layers_per_pipeline_rank = count
    if part.config.recompute_method == "uniform":
        # megatron would look for the rest of a group; results do not depend on how layers are grouped
        part.config = copy.copy(part.config)
        part.config.recompute_num_layers = math.gcd(count, part.config.recompute_num_layers)
    return part


def step_layer(layer: Any, config: BackboneConfig) -> StepLayer:
    """The weights of one of megatron's layers: a group's queries stand in front of its key and its value."""
    width, groups = config.head_dim, config.num_query_groups
    heads = config.num_attention_heads // groups
    begins = [group * (heads + 2) * width for group in range(groups)]
    attention, mlp = layer.self_attention, layer.mlp
    has_norm, names = config.qk_norm is not QkNorm.NONE, config.norm_names
    return StepLayer(
        projections=[(attention.linear_qkv.weight, attention.linear_qkv.bias)],
        query_at=[begin + head * width for begin in begins for head in range(heads)],
        key_at=[begin + heads * width for begin in begins],
        value_at=[begin + (heads + 1) * width for begin in begins],
        out=attention.linear_proj.weight,
        up=[mlp.linear_fc1.weight],
        down=mlp.linear_fc2.weight,
        norm_before_attention=multiplier(layer.input_layernorm) if names.before_attention else None,
        norm_behind_attention=multiplier(layer.post_attention_norm) if names.behind_attention else None,
        norm_before_mlp=multiplier(layer.pre_mlp_layernorm) if names.before_mlp else None,
        norm_behind_mlp=multiplier(layer.post_mlp_norm) if names.behind_mlp else None,
        query_norm=multiplier(attention.q_layernorm) if has_norm else None,
        key_norm=multiplier(attention.k_layernorm) if has_norm else None,
    )
