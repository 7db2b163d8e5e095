"""How the time for a curriculum is shared out: updates of each stage, what stands beside them, measuring."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

LEAST_UPDATES = 4
FIRST_BESIDE = 7.0
"""Seconds a stage takes beside its updates (trial, loading, saving): a guess, which the first stage's own replace."""
SLACK = 1.1
"""How much slower updates are than those of a trial, until a stage has been measured: rows are read as well."""
SHARES: Mapping[str, float] = {"1a": 0.30, "1b": 0.12, "1c": 0.08, "2a": 0.32, "2b": 0.18}
"""Of the time for updates."""
MEASURED: Mapping[str, Collection[str]] = {"stage1": ("1a", "1c"), "student": ("2a", "2b")}
"""What is measured, and behind the last of which stages."""
WEIGHTS: Mapping[str, float] = {"stage1": 1.0, "student": 2.0}
"""What measurings take, beside each other."""


def measured_behind(stages: Collection[str]) -> dict[str, str]:
    """Stage behind which something is measured → what; of stages in their order."""
    last = {part: [name for name in stages if name in own][-1:] for part, own in MEASURED.items()}
    return {name: part for part, names in last.items() for name in names}


@dataclass(slots=True)
class Plan:
    """How many updates a stage gets of the time that is left."""

    end: float
    """On the caller's clock, as ``begun`` and ``now``."""
    kept: dict[str, float]
    """Seconds of each measuring still to come."""
    shares: dict[str, float]
    """Of the stages still to come."""
    slack: float = SLACK
    beside: float = FIRST_BESIDE
    """Seconds of a stage beside its updates."""
    is_guess: bool = True
    """Whether ``beside`` is one."""

    @classmethod
    def of(cls, stages: Collection[str], begin: float, seconds: float, measuring: float) -> Plan:
        """For stages in their order, of which measuring takes a share until the first one has been timed."""
        parts = measured_behind(stages).values()
        unit = measuring * seconds / sum((WEIGHTS[part] for part in parts), start=1e-9)
        return cls(
            end=begin + seconds,
            kept={part: unit * WEIGHTS[part] for part in parts},
            shares={name: SHARES[name] for name in stages},
        )

    def updates(self, stage: str, update_seconds: float, begun: float, now: float) -> int:
        """Of the next stage, which began with a trial that ended ``now`` and found what an update takes."""
        beside = max(self.beside, now - begun)
        left = self.end - begun - sum(self.kept.values()) - beside * len(self.shares)
        part = left * self.shares[stage] / sum(self.shares.values())
        return max(LEAST_UPDATES, int(part / (update_seconds * self.slack)))

    def trained(self, stage: str, update_seconds: float, updates: int, training: float, beside: float) -> None:
        """Take up what a stage cost: seconds in its updates, and of all else from its beginning to its end."""
        del self.shares[stage]
        # of a few updates the first, which is slow, says nothing of the others
        if updates > 20:
            self.slack = max(1.0, training / updates / update_seconds)
        # later stages hold more and save more
        self.beside = beside if self.is_guess else max(self.beside, beside)
        self.is_guess = False

    def measured(self, part: str, seconds: float) -> None:
        """Take up what a measuring cost, and keep accordingly for those still to come."""
        rate = seconds / self.kept.pop(part)
        self.kept = {name: rate * expected for name, expected in self.kept.items()}
