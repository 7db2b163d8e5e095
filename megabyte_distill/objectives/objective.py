"""What the loop needs to know of a stage: how to get losses out of a row. It never learns what a loss is made of."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from megabyte_distill.data.packing import PackedRow
from megabyte_distill.model.stage_link import StageLink

Sums = dict[str, tuple[Tensor, Tensor | int]]
"""name → (sum, count): averages over micro-batches and ranks are exact."""


class Objective(Protocol):
    """Losses and measures of a packed row."""

    weights: dict[str, float]
    """Weight of each loss in the total."""

    def counts(self, row: PackedRow) -> dict[str, int]:
        """How many terms each loss of this row sums: known from the data alone, before the forward."""

    on_first_stage: bool
    """Whether the losses are complete on the first pipeline stage, no backbone being needed."""

    def losses(self, model: nn.Module, row: PackedRow, link: StageLink | None = None) -> dict[str, Tensor]:
        """Sum of each loss over the row (differentiable, fp32 scalars).

        ``link``: of this pipeline stage; on one that hands its results on through it there are no losses yet.
        """

    def measures(self) -> Sums:
        """Further (sum, count) figures of the last :meth:`losses` call, for the log."""
