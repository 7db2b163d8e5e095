"""run_config.yaml: the resolved settings of a run, written beside its checkpoints and compared at resume.

The text is JSON, which every YAML reader accepts, so that no YAML package is needed.
"""

from __future__ import annotations

import json
import typing
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from megabyte_distill import __version__
from megabyte_distill.config.options import strip_optional
from megabyte_distill.config.stage import STAGE_ORDER, StageConfig
from megabyte_distill.config.training import Settings
from megabyte_distill.optional import library_versions

RUN_CONFIG_NAME = "run_config.yaml"
SCHEMA = 1

DROPPED = (("parallel", "context_parallel_size", 1),)
"""Settings of former versions, and the one value that says what is the case now: with another one they are refused."""


def settings_to_dict(settings: Settings) -> dict[str, Any]:
    """Settings as plain JSON values: enums by value, tuples as lists."""
    plain = _plain(settings)
    assert isinstance(plain, dict)
    return plain


def settings_from_dict(plain: Mapping[str, Any]) -> Settings:
    """The inverse of :func:`settings_to_dict`. Absent settings take their default, unknown ones are refused."""
    stages = plain.get("stages", {})
    if not isinstance(stages, Mapping):
        raise ValueError(f"stages: got {type(stages).__name__}, expected one entry a stage")
    unknown = [name for name in stages if name not in STAGE_ORDER]
    if unknown:
        raise ValueError(f"stages: got {', '.join(unknown)}, expected some of {', '.join(STAGE_ORDER)}")
    rest = _dataclass_from(Settings, {name: value for name, value in plain.items() if name != "stages"}, "")
    assert isinstance(rest, Settings)
    parsed = {stage: _dataclass_from(StageConfig, values, f"stages.{stage}.") for stage, values in stages.items()}
    return Settings(
        model=rest.model,
        data=rest.data,
        checkpoint=rest.checkpoint,
        parallel=rest.parallel,
        engine=rest.engine,
        run=rest.run,
        stages=parsed,
    )


def run_config_text(settings: Settings) -> str:
    """What run_config.yaml holds."""
    content = {
        "schema": SCHEMA,
        "megabyte_distill": __version__,
        "versions": library_versions(),
        "settings": settings_to_dict(settings),
    }
    return json.dumps(content, indent=2) + "\n"


def read_run_config(path: Path) -> Settings:
    """The settings of a file that holds :func:`run_config_text`, or of the run_config.yaml of a folder.

    ValueError names the file and what is wrong in it.
    """
    path = path / RUN_CONFIG_NAME if path.is_dir() else path
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected the JSON text that a run writes, got something else ({error})") from None
    if (
        not isinstance(content, dict)
        or content.get("schema") != SCHEMA
        or not isinstance(content.get("settings"), dict)
    ):
        found = content.get("schema") if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{path}: got schema {found!r}, expected {SCHEMA}; it was written by another version")
    for section, name, value in DROPPED:
        if isinstance(found := content["settings"].get(section), dict) and found.get(name) == value:
            del found[name]
    try:
        return settings_from_dict(content["settings"])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def diff(before: Settings, now: Settings) -> list[str]:
    """The settings that differ, one line each: ``2a.lr: 0.001 before, 0.002 now``."""
    flat_before, flat_now = flatten(settings_to_dict(before)), flatten(settings_to_dict(now))
    names = list(dict.fromkeys((*flat_before, *flat_now)))
    missing = "(absent)"
    return [
        f"{name}: {_text(flat_before, name, missing)} before, {_text(flat_now, name, missing)} now"
        for name in names
        if flat_before.get(name, missing) != flat_now.get(name, missing)
    ]


def _text(flat: Mapping[str, Any], name: str, missing: str) -> str:
    return json.dumps(flat[name]) if name in flat else missing


def flatten(plain: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under dotted names, a stage's as ``2a.lr``."""
    flat: dict[str, Any] = {}
    for name, value in plain.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, "" if name == "stages" and not prefix else f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return {item.name: _plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, tuple):
        return [_plain(part) for part in value]
    return value


def _dataclass_from(config_class: type, plain: Any, where: str) -> Any:
    if not isinstance(plain, Mapping):
        raise ValueError(f"{where.rstrip('.') or 'settings'}: got {type(plain).__name__}, expected named settings")
    hints = typing.get_type_hints(config_class)
    unknown = [f"{where}{name}" for name in plain if name not in hints]
    if unknown:
        raise ValueError(f"unknown settings {', '.join(unknown)}; they come from another version")
    return config_class(**{name: _value_from(hints[name], value, f"{where}{name}") for name, value in plain.items()})


def _value_from(hint: Any, value: Any, where: str) -> Any:
    kind, optional = strip_optional(hint)
    if value is None and optional:
        return None
    if isinstance(kind, type) and is_dataclass(kind):
        return _dataclass_from(kind, value, f"{where}.")
    if typing.get_origin(kind) is tuple and isinstance(value, list):
        element = typing.get_args(kind)[0]
        return tuple(_value_from(element, part, where) for part in value)
    if isinstance(kind, type) and issubclass(kind, Enum):
        try:
            return kind(value)
        except ValueError:
            expected = ", ".join(str(member.value) for member in kind)
            raise ValueError(f"{where}: got {value!r}, expected one of {expected}") from None
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if isinstance(kind, type) and isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    raise ValueError(f"{where}: got {value!r}, expected {getattr(kind, '__name__', kind)}")
