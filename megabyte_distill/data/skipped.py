"""What was left out of a data set, counted by reason, with the places of the first ones."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from megabyte_distill.data.manifest import PLACES_KEPT

BLANK_LINES = "blank lines"
NOT_REBUILT = "tokens do not rebuild it"
ANSWER_JOINED = "normalisation joins a prompt and its answer"
OF_ONE_KEY = (NOT_REBUILT, ANSWER_JOINED)
"""Reasons for which a document is left out by itself, and not its record with all keys."""


@dataclass(slots=True)
class Skipped:
    """Counts and places by reason."""

    counts: Counter[str] = field(default_factory=Counter)
    places: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, place: str | None = None, count: int = 1) -> None:
        """One record (or ``count`` of them) left out at a place, if the place is worth keeping."""
        self.counts[reason] += count
        kept = self.places.setdefault(reason, []) if place is not None else []
        if place is not None and len(kept) < PLACES_KEPT:
            kept.append(place)

    def update(self, other: Skipped) -> None:
        """Add what another part left out, which comes behind this one."""
        self.counts.update(other.counts)
        for reason, places in other.places.items():
            kept = self.places.setdefault(reason, [])
            kept.extend(places[: PLACES_KEPT - len(kept)])

    def __bool__(self) -> bool:
        return bool(self.counts)
