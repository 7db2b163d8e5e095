"""A row's exact byte targets as a cache keeps them: the likeliest pairs of each byte, and the mass of the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTargets:
    """Targets of P bytes, E entries in all."""

    counts: Tensor
    """[P] int32 entries of each byte; none on PAD."""
    tail: Tensor
    """[P] fp16 mass of the pairs that were left out."""
    classes: Tensor
    """[E] int16 joint classes, one byte after another, each byte's likeliest first."""
    probabilities: Tensor
    """[E] fp16."""

    def to(self, device: torch.device | str) -> StoredTargets:
        """The same on ``device``."""
        return StoredTargets(
            counts=self.counts.to(device),
            tail=self.tail.to(device),
            classes=self.classes.to(device),
            probabilities=self.probabilities.to(device),
        )

    @classmethod
    def joined(cls, parts: Sequence[StoredTargets]) -> StoredTargets:
        """One after the other."""
        return cls(
            counts=torch.cat([part.counts for part in parts]),
            tail=torch.cat([part.tail for part in parts]),
            classes=torch.cat([part.classes for part in parts]),
            probabilities=torch.cat([part.probabilities for part in parts]),
        )

    @classmethod
    def nothing(cls, size: int) -> StoredTargets:
        """Of ``size`` bytes without a target."""
        return cls(
            counts=torch.zeros(size, dtype=torch.int32),
            tail=torch.zeros(size, dtype=torch.float16),
            classes=torch.zeros(0, dtype=torch.int16),
            probabilities=torch.zeros(0, dtype=torch.float16),
        )
