"""What a stage is, and what its objective may use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from torch import nn

from megabyte_distill.config.model import BackboneConfig
from megabyte_distill.config.stage import StageConfig
from megabyte_distill.data.token_bytes import TokenBytes
from megabyte_distill.objectives.objective import Objective


class TeacherNeed(Enum):
    """What a stage needs of the teacher beside the student's own weights."""

    NONE = "none"
    BEGINNING = "its embedding table, and as many of its first layers as --align-layers says"
    FROZEN = "a frozen copy, or the student's backbone itself where nothing has changed that"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One step of the curriculum."""

    name: str
    """As in ``--stages``."""
    title: str
    """For tables."""
    trains: Callable[[StageConfig, BackboneConfig], tuple[str, ...]]
    """Prefixes of the parameter names that train."""
    teacher: Callable[[StageConfig], TeacherNeed]
    objective: Callable[[StageConfig, nn.Module | None, TokenBytes | None], Objective]
    """Builds the losses from the stage's settings, the teacher's Backbone (in virtual stages where the student is) and
    its token table (None where not needed)."""
    measure: str
    """The validation figure that stands for the stage."""
    reads_loss_mask: bool = False
    """Whether the byte loss and its measure are of what the data's loss mask marks alone (the router's are of all
    bytes); the data must have a mask then."""

    def keeps_backbone(self, config: StageConfig, backbone: BackboneConfig) -> bool:
        """Whether the stage leaves the backbone and its token head as they are."""
        return not any(prefix.startswith("backbone.") for prefix in self.trains(config, backbone))
