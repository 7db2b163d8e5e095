"""Settings come in layers (preset, flags for all stages, flags for one); this file lays one over the other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from megabyte_distill.config.engine import EngineConfig
from megabyte_distill.config.model import ByteSideConfig
from megabyte_distill.config.options import Option, options_of
from megabyte_distill.config.stage import STAGE_ORDER, StageConfig
from megabyte_distill.config.training import (
    WIDTH_OF_TEACHER,
    CheckpointConfig,
    DataConfig,
    ModelFlags,
    ParallelConfig,
    RunConfig,
    Settings,
)

SECTIONS: Mapping[str, type] = {
    "run": RunConfig,
    "model": ModelFlags,
    "byte_side": ByteSideConfig,
    "stage": StageConfig,
    "data": DataConfig,
    "checkpoint": CheckpointConfig,
    "parallel": ParallelConfig,
    "engine": EngineConfig,
}
ALTERNATIVES: tuple[tuple[str, ...], ...] = (
    ("min_lr", "min_lr_ratio"),
    ("lr_warmup_fraction", "lr_warmup_iters"),
    ("backbone_lr", "freeze_backbone"),
    ("data_path", "data_args_path", "train_data_path", "mock_data"),
)
"""Settings of which one is given; a layer that gives one of them takes back what the layers below gave."""
DATA_COMPANIONS = ("split", "valid_data_path")
"""Taken back as well when a layer names another source of training data."""


@dataclass(frozen=True, slots=True)
class Layer:
    """Some settings by field name: ``common`` for the run and every stage, ``stages`` for single stages."""

    common: Mapping[str, Any] = field(default_factory=dict)
    stages: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def all_options() -> dict[str, Option]:
    """Every setting by its field name; names are unique over the sections."""
    options: dict[str, Option] = {}
    for section, config_class in SECTIONS.items():
        for item in options_of(config_class, section):
            assert item.name not in options, f"setting {item.name} exists in {options[item.name].section} and {section}"
            options[item.name] = item
    return options


def settings_from_layers(layers: Iterable[Layer], stages: Iterable[str]) -> Settings:
    """The settings that the layers, weakest first, give for the named stages."""
    options = all_options()
    common: dict[str, Any] = {}
    by_stage: dict[str, dict[str, Any]] = {stage: {} for stage in stages}
    for layer in layers:
        for_stage = {name: value for name, value in layer.common.items() if options[name].section == "stage"}
        _lay_over(common, {name: value for name, value in layer.common.items() if name not in for_stage})
        for stage, values in by_stage.items():
            _lay_over(values, {name: value for name, value in for_stage.items() if options[name].acts_in(stage)})
            _lay_over(values, layer.stages.get(stage, {}))

    def chosen(section: str) -> dict[str, Any]:
        return {name: value for name, value in common.items() if options[name].section == section}

    byte_side = ByteSideConfig(**{"backbone_width": WIDTH_OF_TEACHER, **chosen("byte_side")})
    return Settings(
        model=ModelFlags(byte_side=byte_side, **chosen("model")),
        data=DataConfig(**chosen("data")),
        checkpoint=CheckpointConfig(**chosen("checkpoint")),
        parallel=ParallelConfig(**chosen("parallel")),
        engine=EngineConfig(**chosen("engine")),
        run=RunConfig(**chosen("run")),
        stages={stage: StageConfig(**values) for stage, values in by_stage.items()},
    )


def known_stages(names: Iterable[str]) -> list[str]:
    """The names that are stages, without repetition, in the order of the curriculum."""
    wanted = set(names)
    return [stage for stage in STAGE_ORDER if stage in wanted]


def _lay_over(below: dict[str, Any], above: Mapping[str, Any]) -> None:
    """Put a layer's values over those below, taking back the alternatives to what it gives."""
    for group in ALTERNATIVES:
        if any(_gives(above, name) for name in group):
            taken_back = group + DATA_COMPANIONS if "mock_data" in group else group
            for name in taken_back:
                below.pop(name, None)
    below.update(above)


def _gives(values: Mapping[str, Any], name: str) -> bool:
    """Whether a layer really gives a setting; a switch turned off or an empty list takes nothing back."""
    return values.get(name) not in (None, ()) and values[name] is not False
