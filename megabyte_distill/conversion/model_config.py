"""model_config.json: what the model in a checkpoint folder is made of, written once at its root.

``{"backbone": {...}}`` for a teacher, with ``"byte_side": {...}`` as well for a student.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

from megabyte_distill.config.model import BackboneConfig, ByteSideConfig
from megabyte_distill.data.formats import partial_path, publish, write_and_sync

MODEL_CONFIG_FILE = "model_config.json"
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """What model_config.json says."""

    backbone: BackboneConfig
    byte_side: ByteSideConfig | None = None
    """None for a teacher."""


def write_model_config(folder: Path, config: ModelConfig) -> None:
    """Writes ``folder/model_config.json``, complete or absent; the folder is made if needed."""
    content = {"backbone": to_fields(config.backbone)}
    if config.byte_side is not None:
        content["byte_side"] = to_fields(config.byte_side)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / MODEL_CONFIG_FILE
    write_and_sync(partial_path(path), (json.dumps(content, indent=2) + "\n").encode())
    publish(path)


def read_model_config(folder: Path) -> ModelConfig:
    """Reads ``folder/model_config.json``; ValueError where it is missing, damaged or has unknown or wrong fields."""
    path = folder / MODEL_CONFIG_FILE
    if not folder.is_dir():
        what = "is not a directory" if folder.exists() else "does not exist"
        raise ValueError(f"{folder} {what}; expected a converted teacher or a run's folder with {MODEL_CONFIG_FILE}")
    if not path.is_file():
        raise ValueError(
            f"{folder} has no {MODEL_CONFIG_FILE}; expected a run's folder or a teacher converted by "
            "tools/convert_checkpoint.py import"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not readable JSON ({error}); restore it or convert again") from error
    if not isinstance(content, dict) or not {"backbone"} <= content.keys() <= {"backbone", "byte_side"}:
        keys = sorted(content) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{path}: expected an object with backbone and, for a student, byte_side; got {keys}")
    byte_side = content.get("byte_side")
    return ModelConfig(
        backbone=from_fields(BackboneConfig, content["backbone"], f"{path}, backbone"),
        byte_side=None if byte_side is None else from_fields(ByteSideConfig, byte_side, f"{path}, byte_side"),
    )


def to_fields(config: Any) -> dict[str, Any]:
    """A config dataclass as JSON-able fields: enums as their values, tuples as lists."""

    def plain(value: Any) -> Any:
        if isinstance(value, Enum):
            return value.value
        return list(value) if isinstance(value, tuple) else value

    return {field.name: plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def from_fields(cls: type[_T], fields: Mapping[str, Any], where: str) -> _T:
    """Inverse of :func:`to_fields`; ValueError for unknown, missing or ill-typed fields, all named with ``where``."""
    if not isinstance(fields, Mapping):
        raise ValueError(f"{where}: expected an object, got {fields!r}")
    known = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    problems = [f"unknown field {name}" for name in fields if name not in known]
    problems += [
        f"missing field {name}"
        for name, field in known.items()
        if name not in fields and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    values = {}
    for name, value in fields.items():
        if name in known:
            try:
                values[name] = _typed(value, hints[name])
            except (TypeError, ValueError):
                problems.append(f"{name} is {value!r}, expected {_spelled(hints[name])}")
    if problems:
        raise ValueError(f"{where}: {'; '.join(problems)}; the file belongs to another version or was edited")
    return cls(**values)


def _typed(value: Any, hint: Any) -> Any:
    """``value`` as ``hint`` asks for it; ValueError or TypeError where it is something else."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        [inner] = [argument for argument in arguments if argument is not type(None)]
        return _typed(value, inner)
    if origin is dict:
        if not isinstance(value, dict):
            raise TypeError
        return {_typed(key, arguments[0]): _typed(item, arguments[1]) for key, item in value.items()}
    if origin is tuple:
        if not isinstance(value, list):
            raise TypeError
        return tuple(_typed(item, arguments[0]) for item in value)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return hint(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not hint:
        raise TypeError
    return value


def _spelled(hint: Any) -> str:
    if isinstance(hint, type) and issubclass(hint, Enum):
        return " | ".join(repr(member.value) for member in hint)
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)
