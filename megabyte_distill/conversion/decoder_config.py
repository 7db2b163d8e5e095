"""The config.json fields that all families share, in both directions; each family adds its own and its refusals."""

from __future__ import annotations

from typing import Any

from megabyte_distill.config.model import BackboneConfig
from megabyte_distill.conversion.hf_config import HfConfig
from megabyte_distill.conversion.rope_fields import FULL, SLIDING, read_rope


def read_decoder(
    config: HfConfig, family: str, *, scales_sliding_layers: bool = True, **features: Any
) -> BackboneConfig:
    """A backbone of the shared fields and of ``features``, which are fields of BackboneConfig and go over them.

    ``scales_sliding_layers``: whether transformers stretches RoPE in layers with a window as in the others, which the
    backbone cannot. A family with another ``activation`` than SwiGLU's looks after the fields that name it.
    """
    if "activation" not in features:
        config.refuse("hidden_act", ("silu", "swish"), "the MLP of this family is SwiGLU")
    config.refuse("mlp_bias", (False,), "the backbone's MLP has no bias")
    config.refuse("partial_rotary_factor", (1, 1.0), "only whole-head rotary positions are")
    config.refuse("quantization_config", (), "convert from the unquantised weights")
    width, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    if config.fields.get("head_dim") is None and width % heads:
        raise ValueError(
            f"{config.where}: hidden_size {width} is not divisible by {heads} heads and head_dim is missing"
        )
    groups = config.integer("num_key_value_heads", heads)
    if heads % groups:
        raise ValueError(f"{config.where}: {heads} attention heads cannot share {groups} key/value heads evenly")
    fields: dict[str, Any] = {
        "family": family,
        "num_layers": config.integer("num_hidden_layers"),
        "hidden_size": width,
        "ffn_hidden_size": config.integer("intermediate_size"),
        "num_attention_heads": heads,
        "num_query_groups": groups,
        "head_dim": config.integer("head_dim", width // heads),
        "vocab_size": config.integer("vocab_size"),
        "norm_eps": config.number("rms_norm_eps", 1e-6),
        "tied_embeddings": config.flag("tie_word_embeddings", False),
        "max_position_embeddings": config.integer("max_position_embeddings", 2048),
        **features,
    }
    if "rope_theta" not in fields:
        fields |= read_rope(config)
    backbone = BackboneConfig(**fields)
    if backbone.sliding_layers and backbone.rope_scaling is not None and scales_sliding_layers:
        raise ValueError(f"{config.where}: a sliding window together with RoPE scaling is not supported")
    return backbone


def write_decoder(config: BackboneConfig, model_type: str) -> dict[str, Any]:
    """The shared fields, but for the rotary ones."""
    return {
        "model_type": model_type,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_query_groups,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_embeddings,
        "hidden_act": config.activation.value,
    }


def sliding_layers(config: HfConfig, default: tuple[int, ...]) -> tuple[int, ...]:
    """Layers, counted from 0, that ``layer_types`` calls sliding; ``default`` where the field is absent."""
    kinds = config.fields.get("layer_types")
    if kinds is None:
        return default
    count = config.integer("num_hidden_layers")
    if not isinstance(kinds, list) or len(kinds) != count or not set(kinds) <= {SLIDING, FULL}:
        raise ValueError(f"{config.where}: layer_types is {kinds!r}; expected {count} times {SLIDING} or {FULL}")
    return tuple(layer for layer, kind in enumerate(kinds) if kind == SLIDING)


def layer_types(config: BackboneConfig) -> list[str]:
    """The field ``layer_types``."""
    return [SLIDING if layer in config.sliding_layers else FULL for layer in range(config.num_layers)]
