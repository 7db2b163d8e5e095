"""The command line made from the config dataclasses: flags in, one resolved :class:`Settings` out, or every problem."""

from __future__ import annotations

import argparse
import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from enum import Enum
from typing import Any

from megabyte_distill import __version__, exit_codes
from megabyte_distill.config.blend import read_blend_file
from megabyte_distill.config.errors import ConfigError
from megabyte_distill.config.flags import ReadFlags, read_flags
from megabyte_distill.config.layers import Layer, all_options, known_stages, settings_from_layers
from megabyte_distill.config.model import unread_fields
from megabyte_distill.config.options import NONE_WORD, Option
from megabyte_distill.config.presets import PRESETS, SMOKE
from megabyte_distill.config.stage import StageConfig
from megabyte_distill.config.training import ModelFlags, RunConfig, Settings
from megabyte_distill.config.validation import problems_of

HELP_FLAGS, VERSION_FLAG = ("-h", "--help"), "--version"
_OF_BACKBONE = ("recompute_granularity", "recompute_method", "recompute_num_layers", "recompute_modules")
"""Settings of a stage that act where layers of the backbone run."""
_TITLES = {
    "run": ("run", ""),
    "model": ("model", ""),
    "byte_side": ("byte side", "what is built around the teacher's transformer"),
    "stage": ("stages", "--NAME sets every selected stage, --2a.NAME one of them"),
    "data": ("data", ""),
    "checkpoint": ("checkpoints", ""),
    "parallel": ("parallelism", ""),
    "engine": ("transformer layers", "Transformer Engine and FP8, for backbone and teacher"),
}


def parse_arguments(
    argv: Sequence[str],
    defaults: Mapping[str, Any] | None = None,
    *,
    world_size: int = 1,
    warn: Callable[[str], None] | None = None,
) -> Settings:
    """Settings for a job of ``world_size`` ranks.

    Weakest first: the dataclasses' defaults, the caller's ``defaults`` (by field name, for the whole run or all
    stages), the preset, ``--smoke``, flags, flags for one stage. ``warn`` is told of flags that change nothing, and of
    batches that grow.
    Raises ConfigError with every problem at once.
    """
    read = read_flags(argv, all_options())
    settings, preset_problems = _resolve(read, defaults or {})
    as_preset = settings
    settings = _fit_micro_batches(settings, read, world_size)
    settings, file_problems = _with_blend_file(settings)
    problems = [*read.problems, *preset_problems, *file_problems, *problems_of(settings, world_size=world_size)]
    if problems:
        raise ConfigError(problems)
    if warn is not None:
        for message in (*read.notices, *_without_effect(read, settings), *_grown_batches(as_preset, settings)):
            warn(message)
    return settings


def asked_text(argv: Sequence[str], defaults: Mapping[str, Any] | None = None) -> str | None:
    """What ``--help`` or ``--version`` prints, whatever else is in a command line; None where neither is in it."""
    if VERSION_FLAG in argv:
        return f"megabyte-distill {__version__}\n"
    return help_text(argv, defaults) if any(word in HELP_FLAGS for word in argv) else None


def help_text(argv: Sequence[str] = (), defaults: Mapping[str, Any] | None = None) -> str:
    """The help page. Its defaults are those of the preset (and stages) that ``argv`` selects."""
    options = all_options()
    chosen = [word for word in argv if word not in HELP_FLAGS]
    settings, _ = _resolve(read_flags(chosen, options), defaults or {})
    parser = argparse.ArgumentParser(
        prog="pretrain_byte_kd.sh",
        allow_abbrev=False,
        description="Distil a token-trained language model into a byte-level one, stage by stage.",
        epilog=f"Presets: {', '.join(PRESETS)}. The defaults shown are those of --preset {settings.model.preset}. "
        f"{exit_codes.OF_TRAINING}",
    )
    parser.add_argument(VERSION_FLAG, action="version", help="show the version and exit")
    groups: dict[str, Any] = {}
    for item in options.values():
        if item.section not in groups:
            title, description = _TITLES[item.section]
            groups[item.section] = parser.add_argument_group(title, description or None)
        _add_to_help(groups[item.section], item, _default_text(item, settings))
    return parser.format_help()


def _resolve(read: ReadFlags, defaults: Mapping[str, Any]) -> tuple[Settings, list[str]]:
    """(settings of everything that could be read, problems with the preset's name)."""
    problems: list[str] = []
    preset = read.common.get("preset", defaults.get("preset", ModelFlags().preset))
    if preset not in PRESETS:
        close = difflib.get_close_matches(preset, PRESETS, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        problems.append(f"--preset: got {preset!r}, expected one of {', '.join(PRESETS)}{hint}")
        preset = ModelFlags().preset
    layers = [Layer(common=defaults), PRESETS[preset]]
    if read.common.get("smoke", defaults.get("smoke", False)):
        layers.append(SMOKE)
    layers += [read.layer(), Layer(common={"preset": preset})]
    stages = read.common.get("stages", defaults.get("stages", RunConfig().stages))
    return settings_from_layers(layers, known_stages(RunConfig(stages=stages).stage_names)), problems


def _with_blend_file(settings: Settings) -> tuple[Settings, list[str]]:
    """(settings whose ``data_path`` holds the words of ``data_args_path``, what is wrong with that file)."""
    data = settings.data
    if data.data_args_path is None:
        return settings, []
    problems = []
    if data.data_path:
        problems.append("--data-path and --data-args-path name the same thing twice; leave one out")
    try:
        words = read_blend_file(data.data_args_path)
    except ValueError as error:
        return settings, [*problems, f"--data-args-path: {error}"]
    return replace(settings, data=replace(data, data_path=data.data_path or words)), problems


def _fit_micro_batches(settings: Settings, read: ReadFlags, world_size: int) -> Settings:
    """Presets are written for one rank: where nobody asked for batch sizes, they are made to divide over the ranks.

    The global batch grows to a multiple of the ranks, the micro-batch shrinks until it divides a rank's share.
    """
    ranks = settings.parallel.whole_copies(world_size)

    def fit(stage: str, config: StageConfig) -> StageConfig:
        given = {*read.common, *read.stages.get(stage, {})}
        if ranks < 1 or "micro_batch_size" in given:
            return config
        rows = config.global_batch_size
        if "global_batch_size" not in given:
            rows = -(-rows // ranks) * ranks
        share = math.gcd(rows // ranks, config.micro_batch_size) if rows % ranks == 0 else config.micro_batch_size
        return replace(config, global_batch_size=rows, micro_batch_size=share)

    return replace(settings, stages={stage: fit(stage, config) for stage, config in settings.stages.items()})


def _grown_batches(as_preset: Settings, fitted: Settings) -> list[str]:
    """That a preset's updates read more, where it has fewer rows than there are copies of the model."""
    grown = [
        f"{stage} {before.global_batch_size} to {after.global_batch_size} rows ({after.bytes_per_update:,} bytes)"
        for (stage, before), after in zip(as_preset.stages.items(), fitted.stages.values(), strict=True)
        if before.global_batch_size != after.global_batch_size
    ]
    if not grown:
        return []
    return [
        f"the preset's updates grow, so that their rows divide over all copies of the model: {', '.join(grown)}; "
        "its learning rates and numbers of updates stay. --STAGE.global-batch-size (and --STAGE.seq-length) choose"
    ]


def _without_effect(read: ReadFlags, settings: Settings) -> list[str]:
    """Flags that were given and that no selected stage, or no part of the byte side, listens to."""
    options = all_options()
    selected = ",".join(settings.stages)
    # 1a runs the backbone's first layers, or none
    idle_in_1a = _OF_BACKBONE if "1a" in settings.stages and not settings.align_layers else ()
    messages = [
        f"--{stage}.{options[name].flag} has no effect: stage {stage} is not among --stages {selected}"
        for stage, values in read.stages.items()
        if stage not in settings.stages
        for name in values
    ]
    why_idle = "no layer of the backbone runs in 1a without --align-layers"
    messages += [
        f"--1a.{options[name].flag} has no effect: {why_idle}"
        for name in read.stages.get("1a", {})
        if name in idle_in_1a
    ]
    for name in read.common:
        acts_in = options[name].stages
        running = set(acts_in) & set(settings.stages)
        if acts_in and not running:
            messages.append(f"--{options[name].flag} has no effect: it acts in {', '.join(acts_in)} only")
        elif running == {"1a"} and name in idle_in_1a:
            messages.append(f"--{options[name].flag} has no effect: {why_idle}")
    return messages + [
        f"--{options[name].flag} has no effect: it is about {belongs_to}, which is not given"
        for name, belongs_to in unread_fields(settings.model.byte_side).items()
        if name in read.common
    ]


def _add_to_help(group: Any, item: Option, default: str) -> None:
    """Show one option; argparse only formats here, :mod:`flags` reads."""
    where = f" Acts in {', '.join(item.stages)}." if item.stages else ""
    text = f"{item.help()} (default: {default}).{where}".replace("%", "%%")
    if item.is_bool:
        action = argparse.BooleanOptionalAction if item.negatable else "store_true"
        group.add_argument(f"--{item.flag}", action=action, help=text, default=argparse.SUPPRESS)
        return
    group.add_argument(f"--{item.flag}", metavar=item.metavar, nargs="+" if item.is_list else None, help=text)


def _default_text(item: Option, settings: Settings) -> str:
    """The default in words; one value a stage where the stages differ."""
    if item.section == "stage":
        relevant = {
            stage: _value_text(getattr(config, item.name))
            for stage, config in settings.stages.items()
            if not item.stages or stage in item.stages
        }
        if len(set(relevant.values())) > 1:
            return ", ".join(f"{stage} {text}" for stage, text in relevant.items())
        return next(iter(relevant.values()), _value_text(item.default))
    holder = settings.model.byte_side if item.section == "byte_side" else getattr(settings, item.section)
    return _value_text(getattr(holder, item.name))


def _value_text(value: Any) -> str:
    if value is None or value == ():
        return NONE_WORD
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, Enum):
        return str(value.value)
    if isinstance(value, tuple):
        return " ".join(str(part) for part in value)
    return str(value)
