"""What every tool in tools/ does alike: how it reads its command line, what it says of a mistake, how it ends.

A wrong flag is told in the terms of who typed it: the flag, what was got, what is expected. All of them are told
together, before anything slow is imported. Ctrl-C and SIGTERM let a tool clean up what is half written.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from megabyte_distill import __version__, exit_codes
from megabyte_distill.config.ranges import Range

Run = Callable[[argparse.Namespace], None]
Check = Callable[[argparse.Namespace], Iterable[str]]


@dataclass(frozen=True, slots=True)
class _Refused:
    """Stands where a flag's value should: what was got and what was expected."""

    problem: str


class Failure(Exception):
    """The command is in order, and what it does or judges has failed: the exit code is 1."""


class ToolParser(argparse.ArgumentParser):
    """A command line with ``--version``, its exit codes in ``--help``, and mistakes as one line.

    ``failure`` says of a tool that raises :class:`Failure` when it does.
    """

    def __init__(self, *, failure: str = "", **settings: Any) -> None:
        settings.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(epilog=exit_codes.of_tool(failure), allow_abbrev=False, **settings)
        self.add_argument("--version", action="version", version=f"megabyte-distill {__version__}")
        self._demanded: list[argparse.Action | argparse._MutuallyExclusiveGroup] = []

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's; ``missing`` of the namespace says which required flags are, instead of an end of the tool."""
        actions = [action for action in self._actions if action.required]
        groups = [group for group in self._mutually_exclusive_groups if group.required]
        self._demanded = [*actions, *groups]
        with self._demanding(False):
            namespace, unknown = super().parse_known_args(args, namespace)
        alternatives = [*([action] for action in actions), *(group._group_actions for group in groups)]
        missing = [
            " or ".join(map(_shown, group))
            for group in alternatives
            if all(getattr(namespace, action.dest) is action.default for action in group)
        ]
        namespace.missing = [*getattr(namespace, "missing", ()), *missing]  # a command's own are there
        return namespace, unknown

    @contextlib.contextmanager
    def _demanding(self, is_required: bool) -> Iterator[None]:
        """What is required, as such or not."""
        before = [one.required for one in self._demanded]
        for one in self._demanded:
            one.required = is_required
        try:
            yield
        finally:
            for one, own in zip(self._demanded, before, strict=True):
                one.required = own

    def format_help(self) -> str:
        """As argparse's, which prints it in the midst of parsing."""
        with self._demanding(True):
            return super().format_help()

    def error(self, message: str) -> NoReturn:
        """Ends the tool; for what cannot be told together with the rest, as a flag without its value."""
        self.exit(exit_codes.MISTAKES, f"error: {message}; --help lists the flags\n")


def judged(read: Callable[[str], Any]) -> Callable[[str], Any]:
    """``type=`` of a flag (not of a positional argument) whose mistakes are told together with those of others.

    ``read`` raises ValueError("got …, expected …").
    """

    def parse(text: str) -> Any:
        try:
            return read(text)
        except ValueError as error:
            return _Refused(str(error))

    return parse


def in_range(allowed: Range, **words: Any) -> Callable[[str], Any]:
    """``type=`` of a number; ``words`` stand for values of their own, as ``auto="auto"``."""

    def read(text: str) -> Any:
        if text in words:
            return words[text]
        try:
            return allowed.read(text)
        except ValueError as error:
            raise ValueError(", or ".join((str(error), *words))) from None

    return judged(read)


def choice(*allowed: str, of: Callable[[str], Any] = str, hint: str = "") -> dict[str, Any]:
    """``type=`` and ``metavar=`` of a flag that takes one of some words, as a member ``of`` an enum of them.

    ``hint`` says why there are no others.
    """

    def read(text: str) -> Any:
        if text not in allowed:
            raise ValueError(f"got {text!r}, expected {' or '.join(allowed)}{hint and f'; {hint}'}")
        return of(text)

    return {"type": judged(read), "metavar": f"{{{','.join(allowed)}}}"}


def file_to_read(text: str) -> Path:
    """``type=judged(file_to_read)``: the path of a file, a pipe or a device that is there."""
    path = Path(text)
    if not path.exists() or path.is_dir():
        raise ValueError(f"got {text!r}, expected a file; {'it is a folder' if path.exists() else 'there is none'}")
    return path


def folder_to_read(text: str | Path) -> Path:
    """``type=judged(folder_to_read)``: the path of a folder that is there."""
    path = Path(text)
    if not path.is_dir():
        raise ValueError(f"got '{text}', expected a folder; {'it is a file' if path.exists() else 'there is none'}")
    return path


def folder_to_write(text: str) -> Path:
    """``type=judged(folder_to_write)``: the path of a folder that is there or can be made."""
    path = Path(text)
    if path.exists() and not path.is_dir():
        raise ValueError(f"got {text!r}, expected a folder, which may be new; it is a file")
    return path


def problems_of(flag: str, judge: Callable[[], object]) -> list[str]:
    """What ``judge`` raises as the user's to mend, as a problem of the flag; none where it raises nothing."""
    try:
        judge()
    except (ValueError, OSError) as error:
        return [f"{flag}: {error}"]
    return []


def typed(arguments: argparse.Namespace, flags: Iterable[str], problem: str) -> list[str]:
    """``problem`` of each of these flags that has another value than its default; "{flag}" in it is the flag."""
    return [problem.format(flag=flag) for flag in flags if flag.removeprefix("--").replace("-", "_") in arguments.typed]


def run_tool(
    parser: ToolParser,
    run: Run,
    argv: Sequence[str] | None = None,
    *,
    check: Check | None = None,
    takes_others: bool = False,
) -> int:
    """Parse the command line, run, and return the exit code: 1 after a :class:`Failure`, 2 after mistakes.

    ValueError and OSError are the user's to mend.

    ``check`` tells, before ``run``, what is wrong with flags that were read one by one. Where one could not be read, or
    is required and missing, it sees the default. ``arguments.typed`` has the names of those that differ from theirs.
    ``takes_others``: words that are none of the parser's are ``arguments.others``, for ``check`` to judge.
    """
    for category in (UserWarning, FutureWarning, DeprecationWarning):  # of megatron and torch among themselves
        warnings.filterwarnings("ignore", category=category)
    arguments, problems = _parse(parser, argv, takes_others=takes_others)
    problems += check(arguments) if check is not None else ()
    if problems:
        return _say_errors(problems)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminate)
    try:
        run(arguments)
    except (ValueError, OSError) as error:
        return _say_errors([str(error)])
    except Failure as failure:
        _say_errors([str(failure)])
        return exit_codes.FAILURE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return exit_codes.INTERRUPTED
    return 0


def _parse(
    parser: ToolParser, argv: Sequence[str] | None, *, takes_others: bool
) -> tuple[argparse.Namespace, list[str]]:
    """(what the flags say, defaults in place of what they must not; what is wrong with them)."""
    arguments, unknown = parser.parse_known_args(argv)
    problems = [] if takes_others else [_nobodys(words, _flags_of(parser)) for words in _by_flag(unknown)]
    problems += [f"{flag}: missing, and required; --help says what it is" for flag in arguments.missing]
    del arguments.missing
    for name, value in list(vars(arguments).items()):
        values = value if isinstance(value, list) else [value]
        refused = [one.problem for one in values if isinstance(one, _Refused)]
        problems += [f"--{name.replace('_', '-')}: {problem}" for problem in refused]
        if refused:
            setattr(arguments, name, parser.get_default(name))
    arguments.typed = {name for name, value in vars(arguments).items() if value != parser.get_default(name)}
    arguments.others = unknown
    return arguments, problems


def _by_flag(words: Sequence[str]) -> list[list[str]]:
    """A list for each flag with the words behind it; words in front of all flags are a list of their own."""
    groups: list[list[str]] = []
    for word in words:
        if word.startswith("--") or not groups:
            groups.append([])
        groups[-1].append(word)
    return groups


def _flags_of(parser: argparse.ArgumentParser) -> list[str]:
    """Of a parser and its commands."""
    commands = [action.choices.values() for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    own = [flag for flag in parser._option_string_actions if flag.startswith("--")]
    return own + [flag for parsers in commands for one in parsers for flag in _flags_of(one)]


def _nobodys(words: Sequence[str], flags: Sequence[str]) -> str:
    close = difflib.get_close_matches(words[0].split("=")[0], flags, n=1, cutoff=0.75)
    hint = f"did you mean {close[0]}?" if close else "--help lists them"
    return f"{' '.join(words)}: no flag, and no flag takes it; {hint}"


def _shown(action: argparse.Action) -> str:
    """A flag's name, or what stands for a positional argument."""
    return action.option_strings[0] if action.option_strings else str(action.metavar or action.dest)


def _say_errors(problems: Iterable[str]) -> int:
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return exit_codes.MISTAKES


def _terminate(number: int, frame: FrameType | None) -> None:
    raise SystemExit(exit_codes.TERMINATED)
