"""The teacher's transformer in megatron-core's layers: one class hosts the teacher and the student's backbone."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import (
    TransformerBlock,
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from torch import Tensor

from megabyte_distill.config.model import BackboneConfig
from megabyte_distill.model.attention import CachedRows, KeyValueCache, PackedSegments, SegmentAttention
from megabyte_distill.model.rotary import inverse_frequencies, packed_positions, rotary_angles


class BackboneRMSNorm(torch.nn.RMSNorm):
    """RMSNorm for the local spec that is allowed under sequence parallelism (megatron reads the attribute)."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def transformer_config(config: BackboneConfig, **overrides: Any) -> TransformerConfig:
    """megatron-core's TransformerConfig; ``overrides`` are its fields (dtype, parallel sizes, recompute)."""
    fields: dict[str, Any] = {
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.ffn_hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_query_groups": config.num_query_groups,
        "kv_channels": config.head_dim,
        "layernorm_epsilon": config.norm_eps,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": False,
        # norms and the byte side are born on the CPU as well; whoever builds a model moves all of it at once
        "use_cpu_initialization": True,
        # gradients are sums over the global count, which the loop divides by beforehand
        "calculate_per_token_loss": True,
    }
    return TransformerConfig(**{**fields, **overrides})


def layer_spec(config: TransformerConfig) -> TransformerBlockSubmodules:
    """The local spec with our norm and our packed core attention; the final norm is a field of the block's spec."""
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = BackboneRMSNorm
    spec.submodules.self_attention.submodules.core_attention = SegmentAttention
    return TransformerBlockSubmodules(layer_specs=[spec] * get_num_layers_to_build(config), layer_norm=BackboneRMSNorm)


class Backbone(MegatronModule):  # type: ignore[misc]
    """Decoder-only transformer over packed vectors [M, E], with its token embedding and head beside it.

    Call it on chunk (or token embedding) vectors and cumulative lengths; it returns the states after the final norm.
    """

    def __init__(self, config: BackboneConfig, transformer: TransformerConfig | None = None) -> None:
        transformer = transformer or transformer_config(config)
        super().__init__(config=transformer)
        self.backbone_config = config
        self.embedding = tensor_parallel.VocabParallelEmbedding(
            num_embeddings=self.padded_vocab_size, embedding_dim=config.hidden_size,
            init_method=transformer.init_method, config=transformer,
        )  # fmt: skip
        self.decoder = TransformerBlock(transformer, layer_spec(transformer), pre_process=True, post_process=True)
        self.output_layer: tensor_parallel.ColumnParallelLinear | None = None
        if not config.tied_embeddings:
            self.output_layer = tensor_parallel.ColumnParallelLinear(
                config.hidden_size, self.padded_vocab_size, config=transformer, init_method=transformer.init_method,
                bias=False, gather_output=False,
            )  # fmt: skip
        frequencies = inverse_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
        # kept out of Module._buffers: a bf16 cast must not round the angles
        self._frequencies = frequencies

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding table: W rounded up so that every tensor-parallel size up to 128 divides it."""
        return -(-self.backbone_config.vocab_size // 128) * 128

    def set_input_tensor(self, tensor: Any) -> None:
        """Megatron's schedules call it; a backbone that stands on its own stage takes its input as an argument."""

    def _angles(self, positions: Tensor) -> Tensor:
        if self._frequencies.device != positions.device:
            self._frequencies = self._frequencies.to(positions.device)
        return rotary_angles(positions, self._frequencies)

    def embed(self, tokens: Tensor) -> Tensor:
        """Token embeddings [T, E] of ids [T] int64."""
        embedded: Tensor = self.embedding(tokens)
        return embedded

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        dtype: torch.dtype = self.embedding.weight.dtype
        return dtype

    def forward(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        """States [M, E] after the final norm; x [M, E], positions restart in each segment of cu_seqlens [S + 1]."""
        angles = self._angles(packed_positions(cu_seqlens, x.shape[0]))
        hidden: Tensor = self.decoder(
            x.to(self.dtype)[:, None], None, rotary_pos_emb=angles, packed_seq_params=PackedSegments.of(cu_seqlens)
        )
        return hidden[:, 0]

    def logits(self, hidden: Tensor) -> Tensor:
        """Token logits [M, W] of states [M, E] (padding rows of the table cut off)."""
        weight = self.embedding.weight if self.output_layer is None else self.output_layer.weight
        return F.linear(hidden, weight)[:, : self.backbone_config.vocab_size]

    def init_cache(self, rows: int) -> KeyValueCache:
        """An empty key/value cache for :meth:`step`."""
        return KeyValueCache.empty(rows, self.embedding.weight.device)

    @torch.no_grad()
    def step(self, x: Tensor, cache: KeyValueCache, rows: Tensor) -> Tensor:
        """One more position of the cache's (distinct) rows ``rows`` [K]: x [K, E] → states [K, E]; cache is updated.

        Equal to :meth:`forward` on those rows' whole sequences.
        """
        angles = self._angles(cache.lengths[rows])
        hidden: Tensor = self.decoder(
            x.to(self.dtype)[:, None], None, rotary_pos_emb=angles, packed_seq_params=CachedRows(cache=cache, rows=rows)
        )
        cache.lengths[rows] += 1
        return hidden[:, 0]
