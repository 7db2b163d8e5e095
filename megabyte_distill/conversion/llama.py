"""Llama 2, 3, 3.1, 3.2 and what is a Llama by name (SmolLM2); Mistral, which may have a sliding window."""

from __future__ import annotations

from typing import Any

from megabyte_distill.config.model import BackboneConfig
from megabyte_distill.conversion.decoder_config import read_decoder, write_decoder
from megabyte_distill.conversion.family import Family
from megabyte_distill.conversion.hf_config import HfConfig
from megabyte_distill.conversion.rope_fields import rope_fields

_MISTRAL_WINDOW = 4096
"""Of a config.json without the field; null means none."""
_MISTRAL_CONTEXT = 131_072


def _read_llama(config: HfConfig) -> BackboneConfig:
    config.refuse("attention_bias", (False,), "the projections of this family have no bias")
    window = config.fields.get("sliding_window")
    if window is not None and config.integer("sliding_window") < config.integer("max_position_embeddings", 2048):
        config.refuse("sliding_window", (), "this family attends to all positions; a Mistral has a window")
    return read_decoder(config, "llama")


def _write_llama(config: BackboneConfig) -> dict[str, Any]:
    return {
        **write_decoder(config, "llama"),
        "attention_bias": False,
        "mlp_bias": False,
        **rope_fields(config),
    }


def _read_mistral(config: HfConfig) -> BackboneConfig:
    config.refuse("attention_bias", (False,), "the projections of this family have no bias")
    config.integer("num_key_value_heads")  # absent, transformers takes 8, which nobody means
    context = config.integer("max_position_embeddings", _MISTRAL_CONTEXT)
    window: dict[str, Any] = {}
    if config.fields.get("sliding_window", _MISTRAL_WINDOW) is not None:
        size = config.integer("sliding_window", _MISTRAL_WINDOW)
        if size < context:
            window = {"sliding_window": size, "sliding_layers": tuple(range(config.integer("num_hidden_layers")))}
    return read_decoder(config, "mistral", max_position_embeddings=context, **window)


def _write_mistral(config: BackboneConfig) -> dict[str, Any]:
    return {**write_decoder(config, "mistral"), "sliding_window": config.sliding_window, **rope_fields(config)}


LLAMA = Family(
    name="llama",
    architectures=("LlamaForCausalLM",),
    read_config=_read_llama,
    write_config=_write_llama,
)
MISTRAL = Family(
    name="mistral",
    architectures=("MistralForCausalLM",),
    read_config=_read_mistral,
    write_config=_write_mistral,
)
