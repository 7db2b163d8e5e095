"""Rotary fields of a config.json: ``rope_parameters`` (transformers 5) or ``rope_theta`` and ``rope_scaling``."""

from __future__ import annotations

from typing import Any

from megabyte_distill.conversion.hf_config import HfConfig

_LLAMA3_FIELDS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_DEFAULT_THETA = 10000.0

Scaling = dict[str, float]


def read_rope(config: HfConfig) -> tuple[float, Scaling | None]:
    """(theta, llama3 scaling or None). ValueError for another kind of scaling and where old and new fields disagree."""
    new, old = config.section("rope_parameters"), config.section("rope_scaling")
    scalings = [_scaling(section) for section in (new, old) if section is not None]
    if len(scalings) == 2 and scalings[0] != scalings[1]:
        raise ValueError(f"{config.where}: rope_parameters and rope_scaling contradict each other; remove one of them")
    thetas = [
        section.number("rope_theta")
        for section in (new, old, config)
        if section is not None and section.fields.get("rope_theta") is not None
    ]
    if len(set(thetas)) > 1:
        raise ValueError(f"{config.where}: rope_theta is given as {thetas}; expected one value")
    return (thetas[0] if thetas else _DEFAULT_THETA), (scalings[0] if scalings else None)


def _scaling(section: HfConfig) -> Scaling | None:
    kind = section.fields.get("rope_type", section.fields.get("type", "default"))
    section.refuse("partial_rotary_factor", (1, 1.0), "only whole-head rotary positions are")
    if kind == "default":
        return None
    if kind != "llama3":
        raise ValueError(f"{section.where}: rope_type is {kind!r}; supported are 'default' and 'llama3'")
    return {name: section.number(name) for name in _LLAMA3_FIELDS}


def rope_fields(theta: float, scaling: Scaling | None) -> dict[str, Any]:
    """The fields for a config.json, in the new spelling and, for older readers, in the old one too."""
    kind: dict[str, Any] = {"rope_type": "default"}
    if scaling is not None:
        context = int(scaling["original_max_position_embeddings"])
        kind = {"rope_type": "llama3", **scaling, "original_max_position_embeddings": context}
    fields: dict[str, Any] = {"rope_parameters": {**kind, "rope_theta": theta}, "rope_theta": theta}
    if scaling is not None:
        fields["rope_scaling"] = dict(kind)
    return fields
