"""How sure a figure is: confidence intervals by resampling documents.

A figure is a function of sums over documents. Documents are drawn with replacement, and every figure of one draw comes
from the same documents: teacher and student stay paired, in their ratio too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megabyte_distill.config.ranges import SEED, SHARE, SIZE

Counts = Mapping[str, NDArray[np.float64]]
"""Name → what was counted, one entry a document (or a draw of documents)."""
Interval = tuple[float, float]
_DRAWS_AT_ONCE = 1 << 24
"""Entries of the matrix (draws × documents) that is in memory at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bootstrap:
    """How intervals are made."""

    resamples: int = 1000
    """0 makes none."""
    confidence: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        SIZE.require("resamples", self.resamples)
        SHARE.require("confidence", self.confidence)
        SEED.require("seed", self.seed)

    def intervals(
        self, counts: Counts, figures: Callable[[Counts], Mapping[str, NDArray[np.float64]]]
    ) -> dict[str, Interval]:
        """Percentile intervals of the figures, by name; none for fewer than two documents, which say nothing of spread.

        ``figures`` gets sums, one entry a draw, and returns figures of that length; draws that leave one undefined
        (NaN) do not count for it, and a figure that no draw defines is left out.
        """
        documents = len(next(iter(counts.values())))
        if not self.resamples or documents < 2:
            return {}
        draws = [figures(sums) for sums in self._draws(counts, documents)]
        tail = 50 * (1 - self.confidence)
        found = {}
        for name in draws[0]:
            values = np.concatenate([draw[name] for draw in draws])
            values = values[~np.isnan(values)]
            if values.size:
                low, high = np.percentile(values, [tail, 100 - tail])
                found[name] = (float(low), float(high))
        return found

    def _draws(self, counts: Counts, documents: int) -> Iterator[dict[str, NDArray[np.float64]]]:
        """The sums of some draws at a time."""
        generator = np.random.default_rng(self.seed)
        left, most = self.resamples, max(1, _DRAWS_AT_ONCE // documents)
        while left:
            now = min(left, most)
            times = generator.multinomial(documents, np.full(documents, 1 / documents), size=now)
            yield {name: times @ values for name, values in counts.items()}
            left -= now
