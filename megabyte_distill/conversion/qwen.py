"""Qwen 2 and 2.5 (biases on queries, keys and values) and 3 (norms on queries and keys, a head_dim of its own)."""

from __future__ import annotations

from typing import Any

from megabyte_distill.config.model import BackboneConfig, QkNorm
from megabyte_distill.conversion.decoder_config import layer_types, read_decoder, sliding_layers, write_decoder
from megabyte_distill.conversion.family import Family
from megabyte_distill.conversion.hf_config import HfConfig
from megabyte_distill.conversion.rope_fields import rope_fields

_LAYERS_WITHOUT_WINDOW = 28
_WINDOW = 4096
_CONTEXT = 32_768


def _context(config: HfConfig) -> dict[str, Any]:
    return {"max_position_embeddings": config.integer("max_position_embeddings", _CONTEXT)}


def _window(config: HfConfig) -> dict[str, Any]:
    """The window is in force only where ``use_sliding_window`` says so."""
    config.integer("num_key_value_heads")  # absent, transformers takes 32, which nobody means
    if not config.flag("use_sliding_window", False) or config.fields.get("sliding_window", _WINDOW) is None:
        return {}
    first = config.fields.get("max_window_layers", _LAYERS_WITHOUT_WINDOW)
    if isinstance(first, bool) or not isinstance(first, int) or first < 0:
        raise ValueError(f"{config.where}: max_window_layers is {first!r}; expected a whole number")
    layers = sliding_layers(config, tuple(range(first, config.integer("num_hidden_layers"))))
    return {"sliding_window": config.integer("sliding_window", _WINDOW), "sliding_layers": layers} if layers else {}


def _read_qwen2(config: HfConfig) -> BackboneConfig:
    return read_decoder(config, "qwen2", qkv_bias=True, **_context(config), **_window(config))


def _read_qwen3(config: HfConfig) -> BackboneConfig:
    config.refuse("attention_bias", (False,), "the projections of this family have no bias")
    head_dim = config.integer("head_dim", 128)
    features = {**_context(config), **_window(config)}
    return read_decoder(config, "qwen3", qk_norm=QkNorm.HEAD, head_dim=head_dim, **features)


def _write(config: BackboneConfig) -> dict[str, Any]:
    slides = bool(config.sliding_layers)
    fields = write_decoder(config, config.family)
    if config.family == "qwen3":
        fields["attention_bias"] = False
    return {
        **fields,
        "use_sliding_window": slides,
        "sliding_window": config.sliding_window,
        "max_window_layers": min(config.sliding_layers) if slides else config.num_layers,
        "layer_types": layer_types(config),
        **rope_fields(config),
    }


QWEN2 = Family(
    name="qwen2",
    architectures=("Qwen2ForCausalLM",),
    read_config=_read_qwen2,
    write_config=_write,
)
QWEN3 = Family(
    name="qwen3",
    architectures=("Qwen3ForCausalLM",),
    read_config=_read_qwen3,
    write_config=_write,
)
