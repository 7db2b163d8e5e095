"""What a model family gives to conversion: its configuration in both directions and its table of parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megabyte_distill.config.model import BackboneConfig
from megabyte_distill.conversion.decoder_table import decoder_table
from megabyte_distill.conversion.hf_config import HfConfig
from megabyte_distill.conversion.mapping import ParameterTable


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A family of models with the same parameters. A new one is one file that makes this and a line in families.py."""

    name: str
    """``BackboneConfig.family`` of its models."""
    architectures: tuple[str, ...]
    """Hugging Face class names that are read with this table; the first is written."""
    read_config: Callable[[HfConfig], BackboneConfig]
    """ValueError for every setting the backbone would not reproduce."""
    write_config: Callable[[BackboneConfig], dict[str, Any]]
    """All fields of a config.json that ``read_config`` reads, and ``model_type``."""
    table: Callable[[BackboneConfig, int], ParameterTable] = decoder_table
    """Of a configuration and the number of rows its backbone's embedding table is padded to."""
