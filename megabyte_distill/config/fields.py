"""Configuration dataclasses as plain JSON-able fields and back, strictly.

Imports nothing but the standard library: the Hugging Face export carries this file as it is.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from enum import Enum
from typing import Any, TypeVar

_T = TypeVar("_T")


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
