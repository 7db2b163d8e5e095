"""The families conversion knows, found by Hugging Face architecture or by ``BackboneConfig.family``."""

from __future__ import annotations

from megabyte_distill.conversion.family import Family
from megabyte_distill.conversion.gemma import GEMMA, GEMMA3
from megabyte_distill.conversion.hf_config import HfConfig
from megabyte_distill.conversion.llama import LLAMA, MISTRAL
from megabyte_distill.conversion.olmo import OLMO2, OLMO3
from megabyte_distill.conversion.qwen import QWEN2, QWEN3

FAMILIES: tuple[Family, ...] = (LLAMA, MISTRAL, QWEN2, QWEN3, OLMO2, OLMO3, GEMMA, GEMMA3)
"""A new family: one file beside llama.py that makes a :class:`Family`, and its name here (docs/adding-a-family.md)."""


def family_of_config(config: HfConfig) -> Family:
    """The family of a config.json's architecture; ValueError lists the known ones."""
    architecture = config.architecture
    for family in FAMILIES:
        if architecture in family.architectures:
            return family
    known = ", ".join(name for family in FAMILIES for name in family.architectures)
    raise ValueError(
        f"{config.where}: unknown architecture {architecture}; known are {known}. A family is added with one file "
        "like megabyte_distill/conversion/qwen.py and a line in families.py: docs/adding-a-family.md"
    )


def family_named(name: str) -> Family:
    """The family of ``BackboneConfig.family``; ValueError lists the known ones."""
    for family in FAMILIES:
        if family.name == name:
            return family
    raise ValueError(f"unknown model family {name!r}; known are {', '.join(family.name for family in FAMILIES)}")
