"""Rotary fields of a config.json: ``rope_parameters`` (transformers 5) or ``rope_theta`` and ``rope_scaling``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from megabyte_distill.config.model import BackboneConfig, RopeScaling
from megabyte_distill.conversion.hf_config import HfConfig

SLIDING, FULL = "sliding_attention", "full_attention"
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


def read_rope_by_kind(
    config: HfConfig, default_thetas: Mapping[str, float], sliding_theta_field: str | None = None
) -> dict[str, dict[str, Any]]:
    """The rotary fields of the layers that attend to everything (:data:`FULL`) and of those with a window.

    ``rope_parameters`` has an object for each kind. Without it, and beside it, ``rope_theta`` and ``rope_scaling`` are
    about the full layers, and ``sliding_theta_field`` is the name of the other ones' base. ValueError as
    :func:`read_rope`.
    """
    parameters = config.section("rope_parameters")
    sections = {kind: None if parameters is None else parameters.section(kind) for kind in (FULL, SLIDING)}
    if parameters is not None and not any(sections.values()):
        raise ValueError(
            f"{parameters.where}: has neither {FULL} nor {SLIDING}, and transformers' versions read that differently; "
            "expected one object for each"
        )
    above = {FULL: config.fields, SLIDING: {"rope_theta": config.fields.get(sliding_theta_field or "")}}
    return {
        kind: read_rope(
            HfConfig({**above[kind], "rope_parameters": section and dict(section.fields)}, config.where),
            default_theta=default_thetas[kind],
        )
        for kind, section in sections.items()
    }


def rope_fields_by_kind(config: BackboneConfig) -> dict[str, Any]:
    """:func:`rope_fields` of a family that :func:`read_rope_by_kind` reads."""
    fields = rope_fields(config)
    slides = {"rope_type": "default", "rope_theta": config.sliding_rope_theta or config.rope_theta}
    return {**fields, "rope_parameters": {FULL: fields["rope_parameters"], SLIDING: slides}}


def _scaling(section: HfConfig, config: HfConfig) -> tuple[RopeScaling, Scaling] | None:
    kind = section.fields.get("rope_type", section.fields.get("type", "default"))
    section.refuse("partial_rotary_factor", (1, 1.0), "only whole-head rotary positions are")
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling.LINEAR, {"factor": section.number("factor")}
    if kind == "llama3":
        return RopeScaling.LLAMA3, {name: section.number(name) for name in _LLAMA3_FIELDS}
    if kind != "yarn":
        raise ValueError(
            f"{section.where}: rope_type is {kind!r}; supported are 'default', 'linear', 'llama3' and 'yarn'"
        )
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
        kind = {"rope_type": config.rope_scaling_kind.value, **config.rope_scaling}
        if (context := config.rope_scaling.get("original_max_position_embeddings")) is not None:
            kind["original_max_position_embeddings"] = int(context)
        if config.rope_scaling_kind is RopeScaling.YARN:
            kind["truncate"] = bool(config.rope_scaling["truncate"])
    fields: dict[str, Any] = {
        "rope_parameters": {**kind, "rope_theta": config.rope_theta},
        "rope_theta": config.rope_theta,
    }
    if config.rope_scaling is not None:
        fields["rope_scaling"] = dict(kind)
    return fields
