"""Words of a command line to values by field name. It reads everything, collects every problem and judges no sense."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megabyte_distill.config.layers import Layer
from megabyte_distill.config.megatron_flags import MegatronFlag, answer, find_megatron_flag
from megabyte_distill.config.options import NONE_WORD, Option, parse_text
from megabyte_distill.config.stage import STAGE_ORDER

NEGATION = "no-"


@dataclass(slots=True)
class ReadFlags:
    """What a command line said: values by field name, and what could not be understood."""

    common: dict[str, Any] = field(default_factory=dict)
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    """Flags of Megatron's that were understood and change nothing."""

    def layer(self) -> Layer:
        """The values as the topmost layer of settings."""
        return Layer(common=self.common, stages=self.stages)


def read_flags(words: Sequence[str], options: Mapping[str, Option]) -> ReadFlags:
    """Read ``--name value``, ``--name=value``, ``--name v1 v2`` (lists), ``--switch``, ``--no-switch``, ``--2a.lr 1``.

    A later flag wins over an earlier one. A value may begin with one dash; one with two needs ``--name=--value``.
    """
    read = ReadFlags()
    by_flag = {item.flag: item for item in options.values()}
    position = 0
    while position < len(words):
        word = words[position]
        position += 1
        if not word.startswith("--") or word == "--":
            read.problems.append(f"unexpected word {word!r}: expected a flag, which begins with --")
            continue
        end = position
        while end < len(words) and not words[end].startswith("--"):
            end += 1
        name, equals, attached = word[2:].partition("=")
        used = _read_one(read, by_flag, name, [attached] if equals else None, words[position:end])
        position += used
    return read


def _read_one(
    read: ReadFlags, by_flag: Mapping[str, Option], name: str, attached: list[str] | None, following: Sequence[str]
) -> int:
    """Read one flag into ``read``; returns how many of the following words belong to it."""
    stage, dot, flag = name.partition(".")
    if not dot:
        stage, flag = "", name
    option, negated = _find(by_flag, flag)
    theirs = find_megatron_flag(name) if option is None else None
    if theirs is not None:
        return _read_megatrons(read, name, theirs, attached, following)
    problem = _problem_of_name(by_flag, name, stage, flag, option)
    if option is None or problem is not None:
        read.problems.append(problem or f"unknown flag --{name}")
        return len(following) if attached is None and (option is None or not option.is_bool) else 0
    values = attached if attached is not None else list(following if option.is_list else following[:1])
    used = 0 if attached is not None or option.is_bool else len(values)
    if option.is_bool and (attached is None or negated):
        if attached is not None:
            read.problems.append(f"--{name}={attached[0]}: a switch turned off takes no value")
            return 0
        values = ["false" if negated else "true"]
    if not values:
        read.problems.append(f"--{name} needs a value: {option.help()}")
        return used
    try:
        value = parse_text(option, values)
    except ValueError as error:
        hint = f", or {NONE_WORD}" if option.optional and option.kind is not str else ""
        read.problems.append(f"--{name}: {error}{hint}")
        return used
    target = read.stages.setdefault(stage, {}) if stage else read.common
    target[option.name] = value
    return used


def _read_megatrons(
    read: ReadFlags, name: str, theirs: MegatronFlag, attached: list[str] | None, following: Sequence[str]
) -> int:
    """Read a flag of Megatron's that is none of ours."""
    problem, notice = answer(name, theirs, following if attached is None else attached)
    read.problems += [problem] if problem is not None else []
    read.notices += [notice] if notice is not None else []
    return len(following) if attached is None else 0


def _find(by_flag: Mapping[str, Option], flag: str) -> tuple[Option | None, bool]:
    """(the option a flag sets, whether it switches it off)."""
    if flag in by_flag:
        return by_flag[flag], False
    if flag.startswith(NEGATION):
        option = by_flag.get(flag.removeprefix(NEGATION))
        if option is not None and option.negatable:
            return option, True
    return None, False


def _problem_of_name(
    by_flag: Mapping[str, Option], name: str, stage: str, flag: str, option: Option | None
) -> str | None:
    """Why a flag's name cannot be used, or None."""
    stage_flags = [known for known, item in by_flag.items() if item.section == "stage"]
    if stage and stage not in STAGE_ORDER:
        return f"unknown stage {stage!r} in --{name}: the stages are {', '.join(STAGE_ORDER)}"
    if option is None:
        candidates = stage_flags if stage else by_flag
        return f"unknown flag --{name}{_did_you_mean(flag, candidates, stage)}"
    if stage and option.section != "stage":
        return f"--{name}: --{flag} belongs to the whole run and cannot be set for one stage"
    if stage and option.stages and stage not in option.stages:
        return f"--{name}: --{flag} acts only in {', '.join(option.stages)}"
    return None


def _did_you_mean(flag: str, candidates: Iterable[str], stage: str) -> str:
    close = difflib.get_close_matches(flag.replace("_", "-"), candidates, n=1, cutoff=0.6)
    prefix = f"{stage}." if stage else ""
    return f"; did you mean --{prefix}{close[0]}?" if close else "; --help lists the flags"
