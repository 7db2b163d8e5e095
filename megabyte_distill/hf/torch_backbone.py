"""The teacher's transformer in plain torch, for an export: what megatron's layers compute, under Hugging Face's names.

Parameters are named as in the teacher's own family (``model.layers.0.self_attn.q_proj.weight``, ``lm_head.weight``), so
its conversion table reads and writes them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from megabyte_distill.config.model import BackboneConfig, QkNorm
from megabyte_distill.model.feed_forward import TEACHER_GATES
from megabyte_distill.model.key_value_cache import KeyValueCache, NewPositions, cached_attention
from megabyte_distill.model.normalization import TeacherRMSNorm, multiplier
from megabyte_distill.model.packed_attention import packed_attention
from megabyte_distill.model.rotary import LayerReach, RotaryTable, packed_positions, rotate
from megabyte_distill.model.step_layers import StepBackbone, StepLayer

Attend = Callable[[Tensor, Tensor, Tensor, int, LayerReach], Tensor]
"""(query [N, heads, d], key and value [N, groups, d], layer, its reach) → [N, heads · d]."""


def rms_norm(config: BackboneConfig, width: int) -> TeacherRMSNorm:
    """A norm over ``width`` features as the family has them."""
    return TeacherRMSNorm(width, eps=config.norm_eps, zero_centred=config.zero_centred_norms)


class BackboneAttention(nn.Module):
    """Projections, norms on queries and keys, rotation; who attends to whom is the caller's."""

    def __init__(self, config: BackboneConfig, layer: int) -> None:
        super().__init__()
        width, heads, groups = config.head_dim, config.num_attention_heads, config.num_query_groups
        self.layer, self.head_dim, self.reach = layer, width, LayerReach.of(config, layer)
        self.q_proj = nn.Linear(config.hidden_size, heads * width, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, groups * width, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, groups * width, bias=config.qkv_bias)
        self.o_proj = nn.Linear(heads * width, config.hidden_size, bias=False)
        self.norm_kind = config.qk_norm
        if config.qk_norm is not QkNorm.NONE:
            per_head = config.qk_norm is QkNorm.HEAD
            self.q_norm = rms_norm(config, width if per_head else heads * width)
            self.k_norm = rms_norm(config, width if per_head else groups * width)

    def forward(self, x: Tensor, rotations: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        """[N, E] → [N, E]; rotations as RotaryTable gives them."""
        query, key, value = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.norm_kind is QkNorm.FULL:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = (y.view(y.shape[0], -1, self.head_dim) for y in (query, key, value))
        if self.norm_kind is QkNorm.HEAD:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = (rotate(y, self.reach.choose(rotations)) for y in (query, key))
        result: Tensor = self.o_proj(attend(query, key, value, self.layer, self.reach))
        return result


class BackboneMLP(nn.Module):
    """down(activation(gate(x)) · up(x))."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.ffn_hidden_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.ffn_hidden_size, bias=False)
        self.down_proj = nn.Linear(config.ffn_hidden_size, config.hidden_size, bias=False)
        self.activation = config.activation

    def forward(self, x: Tensor) -> Tensor:
        """[N, E] → [N, E]."""
        result: Tensor = self.down_proj(TEACHER_GATES[self.activation](self.gate_proj(x)) * self.up_proj(x))
        return result


class BackboneLayer(nn.Module):
    """Attention and MLP on a residual stream, with norms in front of them, on what they add, or both."""

    def __init__(self, config: BackboneConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = BackboneAttention(config, layer)
        self.mlp = BackboneMLP(config)
        self.names = config.norm_names
        for name in filter(None, self.names):
            setattr(self, name, rms_norm(config, config.hidden_size))

    def _normed(self, name: str | None, x: Tensor) -> Tensor:
        """By the norm of that name, x itself where there is none."""
        normed: Tensor = x if name is None else getattr(self, name)(x)
        return normed

    def forward(self, x: Tensor, rotations: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        """[N, E] → [N, E]."""
        attended = self.self_attn(self._normed(self.names.before_attention, x), rotations, attend)
        x = x + self._normed(self.names.behind_attention, attended)
        return x + self._normed(self.names.behind_mlp, self.mlp(self._normed(self.names.before_mlp, x)))

    def step_layer(self) -> StepLayer:
        """Its weights: all queries, all keys, all values."""
        attention, mlp = self.self_attn, self.mlp
        projections = [attention.q_proj, attention.k_proj, attention.v_proj]
        begins = [0, attention.q_proj.out_features, attention.q_proj.out_features + attention.k_proj.out_features]
        heads = [
            [begin + place for place in range(0, projection.out_features, attention.head_dim)]
            for begin, projection in zip(begins, projections, strict=True)
        ]
        norms = [None if name is None else multiplier(getattr(self, name)) for name in self.names]
        has_norm = attention.norm_kind is not QkNorm.NONE
        return StepLayer(
            projections=[(projection.weight, projection.bias) for projection in projections],
            query_at=heads[0],
            key_at=heads[1],
            value_at=heads[2],
            out=attention.o_proj.weight,
            up=[mlp.gate_proj.weight, mlp.up_proj.weight],
            down=mlp.down_proj.weight,
            norm_before_attention=norms[0],
            norm_behind_attention=norms[1],
            norm_before_mlp=norms[2],
            norm_behind_mlp=norms[3],
            query_norm=multiplier(attention.q_norm) if has_norm else None,
            key_norm=multiplier(attention.k_norm) if has_norm else None,
        )


class BackboneStack(nn.Module):
    """Token embedding, layers and final norm: the ``model.`` of the parameters' names."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(BackboneLayer(config, layer) for layer in range(config.num_layers))
        self.norm = rms_norm(config, config.hidden_size)

    def forward(self, x: Tensor, rotations: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        """[N, E] in the weights' dtype → states [N, E] after the final norm."""
        x = x.to(self.norm.weight.dtype)
        for layer in self.layers:
            x = layer(x, rotations, attend)
        result: Tensor = self.norm(x)
        return result


class TorchBackbone(nn.Module):
    """A student's backbone with the interface of model/student.py. The token embedding and head are only carried."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.backbone_config = config
        self._scale = config.attention_scale
        self.model = BackboneStack(config)
        if not config.tied_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._rotary: RotaryTable | None = None

    def forward(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        """States [M, E] after the final norm; x [M, E], positions restart in each segment of cu_seqlens [S + 1]."""
        lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).tolist()

        def attend(query: Tensor, key: Tensor, value: Tensor, layer: int, reach: LayerReach) -> Tensor:
            offsets = cu_seqlens.to(torch.int32)
            return packed_attention(query, key, value, lengths, reach.window, self._scale, offsets)

        states: Tensor = self.model(x, self._rotations(packed_positions(cu_seqlens, x.shape[0])), attend)
        return states

    def step_weights(self) -> StepBackbone:
        """The weights themselves, for steps outside these modules."""
        layers = [layer.step_layer() for layer in self.model.layers if isinstance(layer, BackboneLayer)]
        return StepBackbone(config=self.backbone_config, layers=layers, final_norm=multiplier(self.model.norm))

    def init_cache(self, rows: int) -> KeyValueCache:
        """An empty key/value cache for :meth:`step`."""
        return KeyValueCache.empty(rows, self.model.norm.weight.device)

    @torch.no_grad()
    def step(self, x: Tensor, cache: KeyValueCache, rows: Tensor) -> Tensor:
        """One more position of the cache's (distinct) rows ``rows`` [K]: x [K, E] → states [K, E]; cache is updated.

        Equal to :meth:`forward` on those rows' whole sequences.
        """
        states = self.extend(x, cache, rows)
        cache.lengths[rows] += 1
        return states

    @torch.no_grad()
    def extend(self, x: Tensor, cache: KeyValueCache, rows: Tensor, offsets: Tensor | None = None) -> Tensor:
        """States [N, E] of positions x [N, E] behind what the cache's rows ``rows`` [N] hold.

        A row may get several: ``offsets`` [N] counts them from 0 (the default). The caller moves ``cache.lengths`` on
        by as many as he keeps.
        """
        new = NewPositions.of(cache, rows, offsets)

        def attend(query: Tensor, key: Tensor, value: Tensor, layer: int, reach: LayerReach) -> Tensor:
            return cached_attention(
                query, key, value, cache=cache, layer=layer, new=new, window=reach.window, scale=self._scale
            )

        states: Tensor = self.model(x, self._rotations(new.places), attend)
        return states

    def _rotations(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        if self._rotary is None:
            # not in __init__, which transformers runs on the meta device
            self._rotary = RotaryTable(self.backbone_config)
        return self._rotary(positions)
