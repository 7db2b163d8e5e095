"""The parameters of a decoder as ``BackboneConfig`` describes it, under the names transformers gives them.

All known families name the same things alike; what a model has follows from its configuration.
"""

from __future__ import annotations

import re

from megabyte_distill.config.model import BackboneConfig, QkNorm
from megabyte_distill.conversion.mapping import (
    Direct,
    GateUp,
    PaddedVocabulary,
    ParameterMapping,
    ParameterTable,
    PerHead,
    QueryKeyValue,
)

_OLD_FREQUENCIES = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


def decoder_table(config: BackboneConfig, padded_vocab_size: int) -> ParameterTable:
    """Every parameter, in the order a folder is written."""
    rows = {"rows": config.vocab_size, "padded_rows": padded_vocab_size, "width": config.hidden_size}
    mappings: list[ParameterMapping] = [
        PaddedVocabulary(ours="embedding.weight", name="model.embed_tokens.weight", **rows)
    ]
    for layer in range(config.num_layers):
        ours, theirs = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        mappings += [*_attention(config, ours, theirs), *_norms(config, ours, theirs), *_mlp(config, ours, theirs)]
    mappings.append(Direct("decoder.final_layernorm.weight", "model.norm.weight", (config.hidden_size,)))
    repeats = {}
    if config.tied_embeddings:
        repeats["lm_head.weight"] = "model.embed_tokens.weight"
    else:
        mappings.append(PaddedVocabulary(ours="output_layer.weight", name="lm_head.weight", **rows))
    return ParameterTable(mappings=tuple(mappings), repeats=repeats, derived=_OLD_FREQUENCIES)


def _attention(config: BackboneConfig, ours: str, theirs: str) -> list[ParameterMapping]:
    width, heads, groups = config.hidden_size, config.num_attention_heads, config.num_query_groups
    found: list[ParameterMapping] = [
        QueryKeyValue(
            ours=f"{ours}self_attention.linear_qkv.{kind}",
            query=f"{theirs}self_attn.q_proj.{kind}",
            key=f"{theirs}self_attn.k_proj.{kind}",
            value=f"{theirs}self_attn.v_proj.{kind}",
            groups=groups,
            heads_per_group=heads // groups,
            head_dim=config.head_dim,
            tail=tail,
        )
        for kind, tail in (("weight", (width,)), ("bias", ()))
        if kind == "weight" or config.qkv_bias
    ]
    if config.qk_norm is not QkNorm.NONE:
        for letter, count in (("q", heads), ("k", groups)):
            name = f"{theirs}self_attn.{letter}_norm.weight"
            mine = f"{ours}self_attention.{letter}_layernorm.weight"
            found.append(
                PerHead(ours=mine, name=name, heads=count, head_dim=config.head_dim)
                if config.qk_norm is QkNorm.FULL
                else Direct(mine, name, (config.head_dim,))
            )
    projection = f"{ours}self_attention.linear_proj.weight"
    return [*found, Direct(projection, f"{theirs}self_attn.o_proj.weight", (width, heads * config.head_dim))]


def _norms(config: BackboneConfig, ours: str, theirs: str) -> list[ParameterMapping]:
    mine = ("input_layernorm", "post_attention_norm", "pre_mlp_layernorm", "post_mlp_norm")
    return [
        Direct(f"{ours}{own}.weight", f"{theirs}{name}.weight", (config.hidden_size,))
        for own, name in zip(mine, config.norm_names, strict=True)
        if name is not None
    ]


def _mlp(config: BackboneConfig, ours: str, theirs: str) -> list[ParameterMapping]:
    width, inner = config.hidden_size, config.ffn_hidden_size
    return [
        GateUp(
            ours=f"{ours}mlp.linear_fc1.weight",
            gate=f"{theirs}mlp.gate_proj.weight",
            up=f"{theirs}mlp.up_proj.weight",
            each=(inner, width),
        ),
        Direct(f"{ours}mlp.linear_fc2.weight", f"{theirs}mlp.down_proj.weight", (width, inner)),
    ]
