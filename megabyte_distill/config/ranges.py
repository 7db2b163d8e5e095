"""Which numbers a setting may be, and the words that say so: one place for the Python API and the tools' flags.

Imports nothing but the standard library: the Hugging Face export carries this file as it is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """Finite numbers between two ends; ``low`` and ``high`` are inside, ``above`` and ``below`` are not."""

    low: float | None = None
    above: float | None = None
    high: float | None = None
    below: float | None = None
    whole: bool = False
    hint: str = ""
    """What a reader should know of a value in it."""

    @property
    def words(self) -> str:
        """What is expected: "a number above 0 and at most 1 (1 keeps all)"."""
        ends = (("of at least", self.low), ("above", self.above), ("at most", self.high), ("below", self.below))
        said = " and ".join(f"{words} {end}" for words, end in ends if end is not None)
        return f"a {'whole ' * self.whole}number {said}{f' ({self.hint})' if self.hint else ''}"

    def holds(self, value: float) -> bool:
        """Whether a number is in it; NaN is in none."""
        return (
            math.isfinite(value)
            and (self.low is None or value >= self.low)
            and (self.above is None or value > self.above)
            and (self.high is None or value <= self.high)
            and (self.below is None or value < self.below)
            and not (self.whole and value % 1)
        )

    def require(self, name: str, value: float) -> None:
        """ValueError with the setting's name where it is outside."""
        if not self.holds(value):
            raise ValueError(f"{name} is {value}; expected {self.words}")

    def read(self, text: str) -> float:
        """The number that a command line's word stands for; ValueError("got …, expected …") without a flag's name."""
        try:
            value = int(text) if self.whole else float(text)
            float(value)
        except (ValueError, OverflowError):
            raise ValueError(f"got {text!r}, expected {self.words}") from None
        if not self.holds(value):
            raise ValueError(f"got {text}, expected {self.words}")
        return value

    def read_several(self, text: str) -> tuple[float, ...]:
        """The numbers of a list with commas, ascending, each once. Errors as of :meth:`read`, and for an empty list."""
        return tuple(sorted({self.read(word) for word in text.split(",")}))


COUNT = Range(low=1, whole=True)
SIZE = Range(low=0, whole=True)
SHARE = Range(above=0, below=1)
BOUNDARY_THRESHOLD = SHARE
"""Above which a probability of a chunk's end makes one."""
SEED = Range(low=0, below=2**62, whole=True)
TEMPERATURE = Range(low=0, hint="0 is greedy")
TOP_P = Range(above=0, high=1, hint="1 keeps all")
TOP_K = Range(low=0, whole=True, hint="0 keeps all")
MIN_P = Range(low=0, high=1, hint="0 keeps all")
