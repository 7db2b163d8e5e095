"""What the loop needs to know of a stage: how to get losses out of a row. It never learns what a loss is made of."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from megabyte_distill.data.packing import PackedRow

Sums = dict[str, tuple[Tensor, Tensor | int]]
"""name → (sum, count): averages over micro-batches and ranks are exact."""


class Objective(Protocol):
    """Losses and measures of a packed row."""

    weights: dict[str, float]
    """Weight of each loss in the total."""

    def counts(self, row: PackedRow) -> dict[str, int]:
        """How many terms each loss of this row sums: known from the data alone, before the forward."""

    def losses(self, model: nn.Module, row: PackedRow) -> dict[str, Tensor]:
        """Sum of each loss over the row (differentiable, fp32 scalars)."""

    def measures(self) -> Sums:
        """Further (sum, count) figures of the last :meth:`losses` call, for the log."""
