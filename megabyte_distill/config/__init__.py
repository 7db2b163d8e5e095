"""Settings: frozen dataclasses, presets, the command line made from them, and run_config.yaml."""

from megabyte_distill.config.blend import BlendEntry
from megabyte_distill.config.command_line import help_text, parse_arguments
from megabyte_distill.config.errors import ConfigError
from megabyte_distill.config.model import BackboneConfig, ByteMixer, ByteSideConfig, DechunkMode
from megabyte_distill.config.presets import PRESETS
from megabyte_distill.config.run_config import diff, read_run_config
from megabyte_distill.config.stage import (
    CURRICULUM,
    STAGE_ORDER,
    AlignLossScale,
    BoundarySource,
    LrDecayStyle,
    StageConfig,
)
from megabyte_distill.config.training import (
    CheckpointConfig,
    DataConfig,
    KernelMode,
    ModelFlags,
    ParallelConfig,
    RunConfig,
    Settings,
)

__all__ = [
    "CURRICULUM",
    "PRESETS",
    "STAGE_ORDER",
    "AlignLossScale",
    "BackboneConfig",
    "BlendEntry",
    "BoundarySource",
    "ByteMixer",
    "ByteSideConfig",
    "CheckpointConfig",
    "ConfigError",
    "DataConfig",
    "DechunkMode",
    "KernelMode",
    "LrDecayStyle",
    "ModelFlags",
    "ParallelConfig",
    "RunConfig",
    "Settings",
    "StageConfig",
    "diff",
    "help_text",
    "parse_arguments",
    "read_run_config",
]
