"""A Hugging Face config.json read field by field; errors name the file, the field and what was expected."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONFIG_FILE = "config.json"


@dataclass(frozen=True, slots=True)
class HfConfig:
    """A config.json's fields. A field that is null counts as absent, as in transformers."""

    fields: Mapping[str, Any]
    where: str
    """The file, for messages."""

    @classmethod
    def read(cls, folder: Path) -> HfConfig:
        """Of a model folder; ValueError where the folder or its config.json is missing or damaged."""
        if not folder.is_dir():
            what = "is not a directory" if folder.exists() else "does not exist"
            raise ValueError(f"{folder} {what}; expected a Hugging Face model folder with {CONFIG_FILE} in it")
        path = folder / CONFIG_FILE
        if not path.is_file():
            raise ValueError(f"{folder} has no {CONFIG_FILE}; expected a Hugging Face model folder")
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path}: not readable JSON ({error})") from error
        if not isinstance(fields, dict):
            raise ValueError(f"{path}: expected a JSON object, got {type(fields).__name__}")
        return cls(fields, str(path))

    @property
    def architecture(self) -> str:
        """The class name under ``architectures``; ValueError unless there is exactly one."""
        names = self.fields.get("architectures")
        if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
            raise ValueError(f"{self.where}: architectures is {names!r}; expected a list of one class name")
        return names[0]

    def integer(self, name: str, default: int | None = None) -> int:
        """A positive integer; without a default the field is required."""
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise ValueError(f"{self.where}: {name} is {value!r}; expected a positive integer")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A positive number; without a default the field is required."""
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            raise ValueError(f"{self.where}: {name} is {value!r}; expected a positive number")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """A boolean."""
        value = self._value(name, default)
        if not isinstance(value, bool):
            raise ValueError(f"{self.where}: {name} is {value!r}; expected true or false")
        return value

    def section(self, name: str) -> HfConfig | None:
        """A nested object, None where it is absent or null."""
        value = self.fields.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise ValueError(f"{self.where}: {name} is {value!r}; expected an object")
        return HfConfig(value, f"{self.where}, {name}")

    def refuse(self, name: str, harmless: tuple[Any, ...], why: str) -> None:
        """ValueError where a field is there, not null and none of the ``harmless`` values."""
        value = self.fields.get(name)
        if value is not None and value not in harmless:
            raise ValueError(f"{self.where}: {name} = {value!r} is not supported: {why}")

    def _value(self, name: str, default: Any) -> Any:
        value = self.fields.get(name)
        if value is not None:
            return value
        if default is None:
            raise ValueError(f"{self.where}: the field {name} is missing")
        return default
