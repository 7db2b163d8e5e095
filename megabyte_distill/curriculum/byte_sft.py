"""Byte-level fine-tuning: what 2a and 2b share, the cross-entropy over (byte, bit) pairs."""

from __future__ import annotations

from torch import Tensor, nn

from megabyte_distill.config.stage import BoundarySource, StageConfig
from megabyte_distill.data.packing import PackedRow
from megabyte_distill.model.backbone import Backbone
from megabyte_distill.model.router import decide
from megabyte_distill.model.student import Boundaries, Gold, Parts, RouterDecides
from megabyte_distill.objectives.boundary import boundary_bce, boundary_positions, f1_pair
from megabyte_distill.objectives.joint_ce import joint_bits_pair, joint_nll
from megabyte_distill.objectives.objective import Sums

BYTE_LOSS = "byte ce"
ROUTER_LOSS = "router bce"
MEASURE = "joint bits per byte"


class ByteSft:
    """512-way cross-entropy on the next byte and its gold bit; with ``trains_router`` the router's BCE beside it."""

    def __init__(self, config: StageConfig, *, trains_router: bool) -> None:
        self.weights = {BYTE_LOSS: 1.0}
        self._parts = Parts.ENCODER | Parts.BACKBONE | Parts.DECODER
        if trains_router:
            self.weights[ROUTER_LOSS] = config.router_loss_weight
            self._parts = Parts.ALL
        gold = config.boundary_source is BoundarySource.GOLD
        self._boundaries: Boundaries = Gold() if gold else RouterDecides()
        self._measures: Sums = {}

    def counts(self, row: PackedRow) -> dict[str, int]:
        """Bytes that predict something, and those whose boundary is a prediction."""
        counts = {BYTE_LOSS: int(row.loss_mask.sum())}
        if ROUTER_LOSS in self.weights:
            counts[ROUTER_LOSS] = int(boundary_positions(row).sum())
        return counts

    def losses(self, model: nn.Module, row: PackedRow) -> dict[str, Tensor]:
        """Sums in nats."""
        outputs = model(row, self._boundaries, self._parts)
        nll = joint_nll(outputs.logits, row)
        losses = {BYTE_LOSS: nll[row.loss_mask].sum()}
        self._measures = {MEASURE: joint_bits_pair(nll, row)}
        if ROUTER_LOSS in self.weights:
            mask = boundary_positions(row)
            losses[ROUTER_LOSS] = boundary_bce(outputs.p, row.bits)[mask].sum()
            self._measures["boundary f1"] = f1_pair(decide(outputs.p.detach(), row.byte_ids), row)
        return losses

    def measures(self) -> Sums:
        """Joint bits per byte of text, and the router's F1 where it trains."""
        return self._measures


def decoder_objective(config: StageConfig, teacher: Backbone | None) -> ByteSft:
    """2a's."""
    return ByteSft(config, trains_router=False)


def full_objective(config: StageConfig, teacher: Backbone | None) -> ByteSft:
    """2b's."""
    return ByteSft(config, trains_router=True)
