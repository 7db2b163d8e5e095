"""The error a wrong configuration raises: everything that is wrong with it, in one numbered list."""

from __future__ import annotations

from collections.abc import Iterable


class ConfigError(ValueError):
    """All problems of a configuration together; ``problems`` holds them one by one, in order and without repetition."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems: tuple[str, ...] = tuple(dict.fromkeys(problems))
        count = len(self.problems)
        head = "the configuration has 1 problem:" if count == 1 else f"the configuration has {count} problems:"
        lines = (f"  {number}. {problem}" for number, problem in enumerate(self.problems, start=1))
        super().__init__("\n".join((head, *lines)))
