"""What one setting is: a dataclass field that carries its help, unit, range and the stages in which it acts."""

from __future__ import annotations

import dataclasses
import math
import operator
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeVar

Default = TypeVar("Default")
NONE_WORD = "none"
"""How a flag unsets a setting that may be absent."""
_BOUNDS: tuple[tuple[str, str, Callable[[float, float], bool]], ...] = (
    ("low", "at least", operator.ge),
    ("above", "more than", operator.gt),
    ("high", "at most", operator.le),
    ("below", "less than", operator.lt),
)


def option(
    default: Default,
    help: str,
    *,
    unit: str = "",
    metavar: str = "",
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    below: float | None = None,
    stages: tuple[str, ...] = (),
) -> Default:
    """A dataclass field with its documentation.

    ``metavar`` stands in the help page for a value that is neither a number nor one of some words.
    ``low``/``high`` are inclusive bounds, ``above``/``below`` exclusive ones. ``stages`` names the stages in which the
    setting acts; empty means all.
    """
    bounds = {"low": low, "above": above, "high": high, "below": below}
    metadata = {"help": help, "unit": unit, "metavar": metavar, "stages": stages, **bounds}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True, slots=True)
class Option:
    """One setting as the command line, the validator and run_config.yaml see it."""

    section: str
    name: str
    hint: Any
    """The field's resolved type annotation."""
    default: Any
    metadata: Mapping[str, Any]

    @property
    def flag(self) -> str:
        """The flag's words without dashes: ``train-iters``."""
        return self.name.replace("_", "-")

    @property
    def kind(self) -> Any:
        """The annotation without ``| None``."""
        return strip_optional(self.hint)[0]

    @property
    def optional(self) -> bool:
        return strip_optional(self.hint)[1]

    @property
    def is_bool(self) -> bool:
        return self.kind is bool

    @property
    def is_list(self) -> bool:
        return typing.get_origin(self.kind) is tuple

    @property
    def stages(self) -> tuple[str, ...]:
        return tuple(self.metadata.get("stages", ()))

    def acts_in(self, stage: str) -> bool:
        """Whether the setting acts in a stage; what is given for all stages is given for these."""
        return not self.stages or stage in self.stages

    @property
    def negatable(self) -> bool:
        """Whether ``--no-NAME`` exists; a field that is a negation already (no_load_optim) has only its own flag."""
        return self.is_bool and not self.name.startswith("no_")

    @property
    def metavar(self) -> str:
        """What stands for a value in the help page: its unit, the words it may be, or what kind of thing it is."""
        kind = typing.get_args(self.kind)[0] if self.is_list else self.kind
        if issubclass(kind, Enum):
            return f"{{{','.join(str(member.value) for member in kind)}}}"
        if issubclass(kind, str):
            return str(self.metadata["metavar"])
        return self.metadata.get("unit", "").upper() or ("N" if issubclass(kind, int) else "X")

    def help(self) -> str:
        """Help sentence with the unit."""
        unit = self.metadata.get("unit", "")
        return f"{self.metadata['help']} [{unit}]" if unit else str(self.metadata["help"])


def options_of(config_class: type, section: str) -> list[Option]:
    """The settings of a config dataclass, in order; fields without help (nested dataclasses) are left out."""
    hints = typing.get_type_hints(config_class)
    options = []
    for item in dataclasses.fields(config_class):
        if "help" not in item.metadata:
            continue
        default = None if item.default is dataclasses.MISSING else item.default
        options.append(
            Option(section=section, name=item.name, hint=hints[item.name], default=default, metadata=item.metadata)
        )
    return options


def strip_optional(hint: Any) -> tuple[Any, bool]:
    """(the type without None, whether None was allowed)."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        members = [member for member in typing.get_args(hint) if member is not type(None)]
        assert len(members) == 1, f"settings have one type beside None, got {hint}"
        return members[0], True
    return hint, False


def parse_text(option: Option, words: list[str]) -> Any:
    """The value that command line words mean for an option.

    Raises ValueError("got …, expected …") without the flag's name, which only the caller knows in full.
    """
    kind = option.kind
    if option.is_list:
        element = typing.get_args(kind)[0]
        if element is not str:
            words = [part for word in words for part in word.split(",") if part]
        return tuple(_parse_scalar(element, word) for word in words)
    (word,) = words
    if option.optional and word.lower() == NONE_WORD:
        return None
    return _parse_scalar(kind, word)


def _parse_scalar(kind: Any, word: str) -> Any:
    if kind is str:
        return word
    if isinstance(kind, type) and issubclass(kind, Enum):
        for member in kind:
            if member.value == word:
                return member
        raise ValueError(f"got {word!r}, expected one of {', '.join(str(member.value) for member in kind)}")
    if kind is bool:
        if word.lower() in ("true", "false"):
            return word.lower() == "true"
        raise ValueError(f"got {word!r}, expected true or false")
    article = "a whole number" if kind is int else "a number"
    value: float
    try:
        value = int(word) if kind is int else float(word)
    except ValueError:
        raise ValueError(f"got {word!r}, expected {article}") from None
    if not math.isfinite(value):
        raise ValueError(f"got {word!r}, expected a finite number")
    return value


def range_problem(option: Option, value: Any) -> str | None:
    """What is wrong with a value by the option's bounds, as "got …, expected …", or None."""
    if value is None or isinstance(value, bool) or not isinstance(value, int | float):
        return None
    for key, words, holds in _BOUNDS:
        bound = option.metadata.get(key)
        if bound is not None and not holds(value, bound):
            return f"got {value}, expected {words} {bound}"
    return None
