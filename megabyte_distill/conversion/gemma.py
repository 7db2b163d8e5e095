"""Gemma (1) and the text models of Gemma 3: 1 + weight in norms, scaled embeddings, GELU; 3 has windows and more norms.

Gemma 2 is not here: its attention caps the scores, which no fused attention does and the backbone's does not.
"""

from __future__ import annotations

from typing import Any

from megabyte_distill.config.model import Activation, BackboneConfig, QkNorm
from megabyte_distill.conversion.decoder_config import layer_types, read_decoder, sliding_layers, write_decoder
from megabyte_distill.conversion.family import Family
from megabyte_distill.conversion.hf_config import HfConfig
from megabyte_distill.conversion.rope_fields import (
    FULL,
    SLIDING,
    read_rope_by_kind,
    rope_fields,
    rope_fields_by_kind,
)

_HEAD_DIM = 256
_CONTEXT, _CONTEXT_3 = 8192, 131_072
_WINDOW, _PATTERN = 4096, 6
_THETAS = {FULL: 1e6, SLIDING: 1e4}
_LOCAL_THETA = "rope_local_base_freq"


def _features(config: HfConfig, context: int) -> dict[str, Any]:
    config.refuse("attention_bias", (False,), "the projections of this family have no bias")
    config.refuse("use_bidirectional_attention", (False,), "the backbone is causal")
    config.refuse("hidden_activation", (Activation.GELU_TANH.value,), "the MLP of this family is GeGLU by tanh")
    config.integer("num_key_value_heads")  # absent, transformers takes 16 or 4, which nobody means
    return {
        "head_dim": config.integer("head_dim", _HEAD_DIM),
        "activation": Activation.GELU_TANH,
        "zero_centred_norms": True,
        "scaled_embeddings": True,
        "tied_embeddings": config.flag("tie_word_embeddings", True),
        "max_position_embeddings": config.integer("max_position_embeddings", context),
    }


def _read_gemma(config: HfConfig) -> BackboneConfig:
    # the first releases say gelu and mean its approximation
    config.refuse("hidden_act", ("gelu", Activation.GELU_TANH.value), "the MLP of this family is GeGLU by tanh")
    return read_decoder(config, "gemma", **_features(config, _CONTEXT))


def _read_gemma3(config: HfConfig) -> BackboneConfig:
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        config.refuse(name, (), "the backbone does not cap scores or logits, as only Gemma 2 does")
    count, pattern = config.integer("num_hidden_layers"), config.integer("sliding_window_pattern", _PATTERN)
    layers = sliding_layers(config, tuple(layer for layer in range(count) if (layer + 1) % pattern))
    rope = read_rope_by_kind(config, _THETAS, _LOCAL_THETA)
    if rope[SLIDING]["rope_scaling"] is not None:
        raise ValueError(f"{config.where}, rope_parameters: {SLIDING} has {rope[SLIDING]}; expected no scaling")
    window: dict[str, Any] = {}
    if layers:
        window = {
            "sliding_window": config.integer("sliding_window", _WINDOW),
            "sliding_layers": layers,
            "sliding_rope_theta": rope[SLIDING]["rope_theta"],
        }
    return read_decoder(
        config,
        "gemma3",
        scales_sliding_layers=False,
        qk_norm=QkNorm.HEAD,
        query_pre_attn_scalar=config.integer("query_pre_attn_scalar", 256),
        sandwich_norm=True,
        **_features(config, _CONTEXT_3),
        **rope[FULL],
        **window,
    )


def _write_gemma(config: BackboneConfig) -> dict[str, Any]:
    return {**write_decoder(config, "gemma"), "attention_bias": False, **rope_fields(config)}


def _write_gemma3(config: BackboneConfig) -> dict[str, Any]:
    fields, rope = write_decoder(config, "gemma3_text"), rope_fields_by_kind(config)
    activation = fields.pop("hidden_act")
    return {
        **fields,
        "hidden_activation": activation,
        "attention_bias": False,
        "query_pre_attn_scalar": config.query_pre_attn_scalar,
        "sliding_window": config.sliding_window or _WINDOW,
        "layer_types": layer_types(config),
        **rope,
        _LOCAL_THETA: rope["rope_parameters"][SLIDING]["rope_theta"],
    }


GEMMA = Family(
    name="gemma",
    architectures=("GemmaForCausalLM",),
    read_config=_read_gemma,
    write_config=_write_gemma,
)
GEMMA3 = Family(
    name="gemma3",
    architectures=("Gemma3ForCausalLM",),
    read_config=_read_gemma3,
    write_config=_write_gemma3,
)
