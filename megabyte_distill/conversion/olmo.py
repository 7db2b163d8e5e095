"""OLMo 2 (norms behind attention and MLP and over all heads of queries and keys) and 3 (three of four layers slide)."""

from __future__ import annotations

from typing import Any

from megabyte_distill.config.model import BackboneConfig, QkNorm
from megabyte_distill.conversion.decoder_config import layer_types, read_decoder, sliding_layers, write_decoder
from megabyte_distill.conversion.family import Family
from megabyte_distill.conversion.hf_config import HfConfig
from megabyte_distill.conversion.rope_fields import (
    FULL,
    SLIDING,
    read_rope,
    read_rope_by_kind,
    rope_fields,
    rope_fields_by_kind,
)

_OLMO3_THETA = 500_000.0
_EPS = 1e-5
_WINDOW = 4096


def _features(config: HfConfig) -> dict[str, Any]:
    config.refuse("attention_bias", (False,), "the projections of this family have no bias")
    return {"qk_norm": QkNorm.FULL, "post_norm": True, "norm_eps": config.number("rms_norm_eps", _EPS)}


def _read_olmo2(config: HfConfig) -> BackboneConfig:
    return read_decoder(config, "olmo2", **_features(config))


def _read_olmo3(config: HfConfig) -> BackboneConfig:
    count = config.integer("num_hidden_layers")
    layers = sliding_layers(config, tuple(layer for layer in range(count) if (layer + 1) % 4))
    window = {"sliding_window": config.integer("sliding_window", _WINDOW), "sliding_layers": layers} if layers else {}
    return read_decoder(
        config, "olmo3", scales_sliding_layers=False, **_features(config), **_olmo3_rope(config), **window
    )


def _olmo3_rope(config: HfConfig) -> dict[str, Any]:
    """The rotation of the full layers; that of the sliding ones must be the same without scaling."""
    if config.section("rope_parameters") is None:
        return read_rope(config, default_theta=_OLMO3_THETA)
    full, slides = read_rope_by_kind(config, dict.fromkeys((FULL, SLIDING), _OLMO3_THETA)).values()
    if slides["rope_scaling"] is not None or slides["rope_theta"] != full["rope_theta"]:
        raise ValueError(
            f"{config.where}, rope_parameters: {SLIDING} has {slides}; expected no scaling and the rope_theta of "
            f"{FULL}, {full['rope_theta']}"
        )
    return full


def _write_olmo2(config: BackboneConfig) -> dict[str, Any]:
    return {**write_decoder(config, "olmo2"), "attention_bias": False, **rope_fields(config)}


def _write_olmo3(config: BackboneConfig) -> dict[str, Any]:
    return {
        **write_decoder(config, "olmo3"),
        "attention_bias": False,
        "sliding_window": config.sliding_window or _WINDOW,
        "layer_types": layer_types(config),
        **rope_fields_by_kind(config),
    }


OLMO2 = Family(
    name="olmo2",
    architectures=("Olmo2ForCausalLM",),
    read_config=_read_olmo2,
    write_config=_write_olmo2,
)
OLMO3 = Family(
    name="olmo3",
    architectures=("Olmo3ForCausalLM",),
    read_config=_read_olmo3,
    write_config=_write_olmo3,
)
