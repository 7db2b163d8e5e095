"""Layers for the CPU that are called, name their parameters and keep their weights as Transformer Engine's do.

They compute with torch what Transformer Engine computes with its kernels, so that everything around those kernels can
be run and compared with the local layers: the spec, the names in a checkpoint, what attention is handed.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.transformer import ModuleSpec
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from megabyte_distill.config.model import Activation, BackboneConfig
from megabyte_distill.model.backbone_layers import BackboneRMSNorm, HeadRMSNorm, LayerParts
from megabyte_distill.model.engine_layers import EngineAttention
from megabyte_distill.model.packed_attention import packed_attention


class KeptColumn(tensor_parallel.ColumnParallelLinear):  # type: ignore[misc]
    """Computes with a copy of its weight, taken anew only in the first micro-batch."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.is_first_microbatch = True
        self.copy: Tensor | None = None

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        if self.is_first_microbatch:
            self.copy = self.weight.detach().clone()
        self.is_first_microbatch = False
        assert self.copy is not None
        # the copy's values, the weight's gradient
        weight = self.copy + (self.weight - self.weight.detach())
        out: tuple[Tensor, None] = super().forward(x, weight=weight)
        return out

    def get_extra_state(self) -> Tensor:
        return torch.ones(3)


class NormColumn(KeptColumn):
    """The norm inside, its weight called ``layer_norm_weight``."""

    def __init__(self, input_size: int, output_size: int, *, config: Any, **options: Any) -> None:
        super().__init__(input_size, output_size, config=config, **options)
        self.layer_norm_weight = torch.nn.Parameter(torch.ones(input_size))
        self.offset = float(config.layernorm_zero_centered_gamma)
        self.layer_norm_weight.sequence_parallel = config.sequence_parallel
        self.layer_norm_weight.tensor_model_parallel = False
        self.eps = config.layernorm_epsilon

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return super().forward(F.rms_norm(x, x.shape[-1:], self.offset + self.layer_norm_weight, self.eps))


class ThdAttention(torch.nn.Module):
    """Takes what megatron's TEDotProductAttention takes, reads what it reads."""

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__()
        assert attn_mask_type is AttnMaskType.causal and attention_type == "self"
        self.window, self.every, self.scale = config.window_size, config.window_attn_skip_freq, softmax_scale

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask: None, attn_mask_type: Any, packed_seq_params: Any
    ) -> Tensor:
        assert mask is None and attn_mask_type is AttnMaskType.causal
        given = {f.name: getattr(packed_seq_params, f.name) for f in dataclasses.fields(packed_seq_params)}
        assert given.pop("qkv_format") == "thd" and query.dim() == key.dim() == value.dim() == 3
        offsets, longest = given.pop("cu_seqlens_q"), given.pop("max_seqlen_q")
        assert torch.equal(given.pop("cu_seqlens_kv"), offsets) and given.pop("max_seqlen_kv") == longest
        assert all(value is None for value in given.values()), given
        assert offsets.dtype is torch.int32 and offsets[0] == 0 and offsets[-1] == query.shape[0]
        lengths = (offsets[1:] - offsets[:-1]).tolist()
        assert longest == max(lengths) and isinstance(longest, int)
        # (left, right) of one's own position, in every layer that has it
        assert self.window is None or (self.window[1] == 0 and self.every is None)
        window = None if self.window is None else self.window[0] + 1
        return packed_attention(query, key, value, lengths, window, self.scale)


def turn(x: Tensor, angles: Tensor) -> Tensor:
    """As megatron's fused_apply_rotary_pos_emb: [N, 1, heads, d], angles [N, 1, 1, d] in fp32."""
    assert x.dim() == 4 and angles.shape == (x.shape[0], 1, 1, x.shape[3]) and angles.dtype is torch.float32
    first, second = x.chunk(2, dim=-1)
    return x * angles.cos() + torch.cat((-second, first), dim=-1) * angles.sin()


def gate(x: Tensor) -> Tensor:
    """As Transformer Engine's SwiGLU."""
    first, second = x.chunk(2, dim=-1)
    return F.silu(first) * second


def twin_parts(backbone: BackboneConfig) -> LayerParts:
    """As ``engine_parts``."""
    return LayerParts(
        column=KeptColumn,
        norm_column=NormColumn,
        row=tensor_parallel.RowParallelLinear,
        norm=BackboneRMSNorm,
        head_norm=HeadRMSNorm,
        core_attention=ModuleSpec(
            module=EngineAttention, params={"backbone": backbone, "core": ThdAttention, "turn": turn}
        ),
        turns_by_angles=True,
        gate=gate if backbone.activation is Activation.SILU else None,
    )
