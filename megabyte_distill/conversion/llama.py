"""Llama 2, 3, 3.1, 3.2 and what shares their parameters: SmolLM2 (a Llama by name), Mistral without windows."""

from __future__ import annotations

import re
from typing import Any

from megabyte_distill.config.model import BackboneConfig
from megabyte_distill.conversion.family import Family
from megabyte_distill.conversion.hf_config import HfConfig
from megabyte_distill.conversion.mapping import (
    Direct,
    GateUp,
    PaddedVocabulary,
    ParameterMapping,
    ParameterTable,
    QueryKeyValue,
)
from megabyte_distill.conversion.rope_fields import read_rope, rope_fields

_OLD_FREQUENCIES = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


def read_config(config: HfConfig) -> BackboneConfig:
    """The backbone of a Llama config.json; ValueError for settings it would not reproduce."""
    for name in ("attention_bias", "mlp_bias"):
        config.refuse(name, (False,), "the backbone's linear layers have no bias")
    config.refuse("hidden_act", ("silu", "swish"), "the backbone's MLP is SwiGLU")
    config.refuse("partial_rotary_factor", (1, 1.0), "only whole-head rotary positions are")
    config.refuse("quantization_config", (), "convert from the unquantised weights")
    context = config.integer("max_position_embeddings", 2048)
    if config.fields.get("sliding_window") is not None and config.integer("sliding_window") < context:
        config.refuse(
            "sliding_window", (), f"attention over all {context} positions only; give a model without a window"
        )
    width, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    if config.fields.get("head_dim") is None and width % heads:
        raise ValueError(
            f"{config.where}: hidden_size {width} is not divisible by {heads} heads and head_dim is missing"
        )
    groups = config.integer("num_key_value_heads", heads)
    if heads % groups:
        raise ValueError(f"{config.where}: {heads} attention heads cannot share {groups} key/value heads evenly")
    theta, scaling = read_rope(config)
    return BackboneConfig(
        family="llama",
        num_layers=config.integer("num_hidden_layers"),
        hidden_size=width,
        ffn_hidden_size=config.integer("intermediate_size"),
        num_attention_heads=heads,
        num_query_groups=groups,
        head_dim=config.integer("head_dim", width // heads),
        vocab_size=config.integer("vocab_size"),
        norm_eps=config.number("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        tied_embeddings=config.flag("tie_word_embeddings", False),
        max_position_embeddings=context,
    )


def write_config(config: BackboneConfig) -> dict[str, Any]:
    """The config.json fields of a backbone; inverse of :func:`read_config`."""
    return {
        "model_type": "llama",
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
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        **rope_fields(config.rope_theta, config.rope_scaling),
    }


def table(config: BackboneConfig, padded_vocab_size: int) -> ParameterTable:
    """Every parameter of a Llama."""
    rows = {"rows": config.vocab_size, "padded_rows": padded_vocab_size, "width": config.hidden_size}
    mappings: list[ParameterMapping] = [
        PaddedVocabulary(ours="embedding.weight", name="model.embed_tokens.weight", **rows)
    ]
    for layer in range(config.num_layers):
        mappings += _layer(config, f"decoder.layers.{layer}.", f"model.layers.{layer}.")
    mappings.append(Direct("decoder.final_layernorm.weight", "model.norm.weight", (config.hidden_size,)))
    repeats = {}
    if config.tied_embeddings:
        repeats["lm_head.weight"] = "model.embed_tokens.weight"
    else:
        mappings.append(PaddedVocabulary(ours="output_layer.weight", name="lm_head.weight", **rows))
    return ParameterTable(mappings=tuple(mappings), repeats=repeats, derived=_OLD_FREQUENCIES)


def _layer(config: BackboneConfig, ours: str, theirs: str) -> list[ParameterMapping]:
    width, heads = config.hidden_size, config.num_attention_heads
    return [
        Direct(f"{ours}input_layernorm.weight", f"{theirs}input_layernorm.weight", (width,)),
        QueryKeyValue(
            ours=f"{ours}self_attention.linear_qkv.weight",
            query=f"{theirs}self_attn.q_proj.weight",
            key=f"{theirs}self_attn.k_proj.weight",
            value=f"{theirs}self_attn.v_proj.weight",
            groups=config.num_query_groups,
            heads_per_group=heads // config.num_query_groups,
            head_dim=config.head_dim,
            tail=(width,),
        ),
        Direct(
            f"{ours}self_attention.linear_proj.weight",
            f"{theirs}self_attn.o_proj.weight",
            (width, heads * config.head_dim),
        ),
        Direct(f"{ours}pre_mlp_layernorm.weight", f"{theirs}post_attention_layernorm.weight", (width,)),
        GateUp(
            ours=f"{ours}mlp.linear_fc1.weight",
            gate=f"{theirs}mlp.gate_proj.weight",
            up=f"{theirs}mlp.up_proj.weight",
            each=(config.ffn_hidden_size, width),
        ),
        Direct(f"{ours}mlp.linear_fc2.weight", f"{theirs}mlp.down_proj.weight", (width, config.ffn_hidden_size)),
    ]


LLAMA = Family(
    name="llama",
    architectures=("LlamaForCausalLM", "MistralForCausalLM"),
    read_config=read_config,
    write_config=write_config,
    table=table,
)
