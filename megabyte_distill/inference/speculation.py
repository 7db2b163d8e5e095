"""How far to draft: bytes that the byte side writes past a chunk's end before the backbone has seen that chunk.

Drafts never change what comes out (the engine verifies each), only how long it takes: a backbone pass that finds the
drafts right has read several chunks for the price of one, wrong drafts are work for nothing.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict, deque
from dataclasses import dataclass, field
from typing import Protocol

CHOICES = (0, 2, 4, 8, 16)
"""Lengths that ``auto`` chooses from."""
_WINDOW = 4
"""Backbone passes a row between two choices."""
_WASTE = 0.03
"""Share of the time that trying other lengths may cost over plain decoding."""
_REMEMBERED = 5
"""Windows of a length that its cost is the median of: one that something else on the machine held up says nothing."""
_PATIENCE = 16
"""Windows of the best length before another one is tried."""


class DraftLength(Protocol):
    """Decides from what it is told of every step."""

    @property
    def longest(self) -> int:
        """The most bytes that :attr:`now` will ever be."""

    @property
    def now(self) -> int:
        """Bytes to draft behind a chunk's end."""

    @property
    def least_hope(self) -> float:
        """Log-probability of a row's drafts together below which it drafts no further."""

    def observe(self, new_bytes: int, passes: float, seconds: float) -> None:
        """A step gave ``new_bytes`` and cost ``seconds``; the backbone stepped this share of the rows, ``passes``."""


@dataclass(frozen=True, slots=True)
class FixedLength:
    """Always the same."""

    now: int

    @property
    def longest(self) -> int:
        """The same."""
        return self.now

    @property
    def least_hope(self) -> float:
        """Any."""
        return -math.inf

    def observe(self, new_bytes: int, passes: float, seconds: float) -> None:
        """Nothing to learn."""


@dataclass
class MeasuredLength:
    """The length that was fastest so far, plain decoding among them.

    Others are tried now and then, for as long as what that costs over plain decoding stays a small share of all time.
    """

    now: int = 0
    _windows: dict[int, deque[float]] = field(default_factory=lambda: defaultdict(lambda: deque(maxlen=_REMEMBERED)))
    _bytes: int = 0
    _passes: float = 0.0
    _seconds: float = 0.0
    _total: float = 0.0
    _wasted: float = 0.0
    _since_trial: int = 0
    _age: dict[int, int] = field(default_factory=dict)

    @property
    def cost(self) -> dict[int, float]:
        """Seconds a byte, of the lengths that were tried."""
        return {length: statistics.median(found) for length, found in self._windows.items()}

    @property
    def longest(self) -> int:
        """The longest of the choices."""
        return max(CHOICES)

    @property
    def least_hope(self) -> float:
        """One in a hundred: long drafts are rarely right, so that few are lost."""
        return math.log(0.01)

    def observe(self, new_bytes: int, passes: float, seconds: float) -> None:
        """As :class:`DraftLength` says."""
        self._bytes += new_bytes
        self._passes += passes
        self._seconds += seconds
        if self._passes >= _WINDOW and self._bytes:
            self._close_window()

    def _close_window(self) -> None:
        self._windows[self.now].append(self._seconds / self._bytes)
        cost = self.cost
        self._total += self._seconds
        self._wasted += self._seconds - min(self._seconds, cost[0] * self._bytes)
        self._age = {length: age + 1 for length, age in self._age.items()} | {self.now: 0}
        self._bytes, self._passes, self._seconds = 0, 0.0, 0.0
        self.now = self._choice(cost)

    def _choice(self, cost: dict[int, float]) -> int:
        best = min(cost, key=lambda length: cost[length])
        self._since_trial += 1
        if best and self._age[0] >= 2 * _PATIENCE:
            return 0  # what others are measured against
        is_time = self._since_trial >= _PATIENCE or len(cost) < len(CHOICES)
        if not is_time or self._wasted > _WASTE * self._total:
            return best
        self._since_trial = 0
        # what has not been measured for the longest time
        return max(CHOICES, key=lambda length: (self._age.get(length, math.inf), -length))
