"""1c, boundary learning: the router alone learns the tokenizer's cuts from the frozen encoder's states."""

from __future__ import annotations

from torch import Tensor, nn

from megabyte_distill.config.stage import StageConfig
from megabyte_distill.curriculum.stage import Stage, TeacherNeed
from megabyte_distill.data.packing import PackedRow
from megabyte_distill.model.router import decide
from megabyte_distill.model.stage_link import StageLink
from megabyte_distill.model.student import Parts
from megabyte_distill.objectives.boundary import boundary_bce, boundary_positions, chunk_lengths, f1_pair
from megabyte_distill.objectives.objective import Sums

LOSS = "router bce"
MEASURE = "boundary f1"


class BoundaryLearning:
    """Binary cross-entropy of p against gold bits over all bytes but a segment's last."""

    on_first_stage = True

    def __init__(self, config: StageConfig, teacher: nn.Module | None) -> None:
        self.weights = {LOSS: 1.0}
        self._measures: Sums = {}

    def counts(self, row: PackedRow) -> dict[str, int]:
        """Bytes that are not a segment's last."""
        return {LOSS: int(boundary_positions(row).sum())}

    def losses(self, model: nn.Module, row: PackedRow, link: StageLink | None = None) -> dict[str, Tensor]:
        """Summed over those bytes, in nats."""
        p = model(row, parts=Parts.ENCODER | Parts.ROUTER).p
        predicted = decide(p.detach(), row.byte_ids)
        self._measures = {MEASURE: f1_pair(predicted, row), **chunk_lengths(row, predicted)}
        return {LOSS: boundary_bce(p, row.bits)[boundary_positions(row)].sum()}

    def measures(self) -> Sums:
        """F1 of the router's ends; bytes per chunk, gold and the router's."""
        return self._measures


STAGE = Stage(
    name="1c",
    title="boundary learning",
    trains=lambda config, backbone: ("router.",),
    teacher=lambda config: TeacherNeed.NONE,
    objective=lambda config, teacher, table: BoundaryLearning(config, teacher),
    measure=MEASURE,
)
