"""Rotary fields of a config.json: ``rope_parameters`` (transformers 5) or ``rope_theta`` and ``rope_scaling``."""

from __future__ import annotations

import math
from typing import Any

from megabyte_distill.config.model import BackboneConfig, RopeScaling
from megabyte_distill.conversion.hf_config import HfConfig

_LLAMA3_FIELDS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_DEFAULT_THETA = 10000.0

Scaling = dict[str, float]


def read_rope(config: HfConfig, default_theta: float = _DEFAULT_THETA) -> dict[str, Any]:
    """The rotary fields of BackboneConfig. ValueError for other scalings and where old and new fields disagree."""
    new, old = config.section("rope_parameters"), config.section("rope_scaling")
    scalings = [_scaling(section, config) for section in (new, old) if section is not None]
    if len(scalings) == 2 and scalings[0] != scalings[1]:
        raise ValueError(f"{config.where}: rope_parameters and rope_scaling contradict each other; remove one of them")
    thetas = [
        section.number("rope_theta")
        for section in (new, old, config)
        if section is not None and section.fields.get("rope_theta") is not None
    ]
    if len(set(thetas)) > 1:
        raise ValueError(f"{config.where}: rope_theta is given as {thetas}; expected one value")
    fields: dict[str, Any] = {"rope_theta": thetas[0] if thetas else default_theta, "rope_scaling": None}
    if scalings and scalings[0] is not None:
        fields["rope_scaling_kind"], fields["rope_scaling"] = scalings[0]
    return fields


def _scaling(section: HfConfig, config: HfConfig) -> tuple[RopeScaling, Scaling] | None:
    kind = section.fields.get("rope_type", section.fields.get("type", "default"))
    section.refuse("partial_rotary_factor", (1, 1.0), "only whole-head rotary positions are")
    if kind == "default":
        return None
    if kind == "llama3":
        return RopeScaling.LLAMA3, {name: section.number(name) for name in _LLAMA3_FIELDS}
    if kind != "yarn":
        raise ValueError(f"{section.where}: rope_type is {kind!r}; supported are 'default', 'llama3' and 'yarn'")
    for name in ("mscale", "mscale_all_dim"):
        section.refuse(name, (), "YaRN's attention_factor is given by itself or follows from factor")
    factor = section.number("factor")
    context = config.fields.get("max_position_embeddings")
    return RopeScaling.YARN, {
        "factor": factor,
        "beta_fast": section.number("beta_fast", 32.0),
        "beta_slow": section.number("beta_slow", 1.0),
        "attention_factor": section.number("attention_factor", 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0),
        "original_max_position_embeddings": section.number("original_max_position_embeddings", context),
        "truncate": float(section.flag("truncate", True)),
    }


def rope_fields(config: BackboneConfig) -> dict[str, Any]:
    """The fields for a config.json, in the new spelling and, for older readers, in the old one too."""
    kind: dict[str, Any] = {"rope_type": "default"}
    if config.rope_scaling is not None:
        context = int(config.rope_scaling["original_max_position_embeddings"])
        kind = {
            "rope_type": config.rope_scaling_kind.value,
            **config.rope_scaling,
            "original_max_position_embeddings": context,
        }
        if config.rope_scaling_kind is RopeScaling.YARN:
            kind["truncate"] = bool(config.rope_scaling["truncate"])
    fields: dict[str, Any] = {
        "rope_parameters": {**kind, "rope_theta": config.rope_theta},
        "rope_theta": config.rope_theta,
    }
    if config.rope_scaling is not None:
        fields["rope_scaling"] = dict(kind)
    return fields
