"""Byte-level fine-tuning: what 2a, 2b and 3a share, the cross-entropy over (byte, bit) pairs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from megabyte_distill.config.stage import BoundarySource, ByteTargets, StageConfig
from megabyte_distill.curriculum.on_stage import SideBySide, bare, run_on_stage
from megabyte_distill.curriculum.stage import TeacherNeed
from megabyte_distill.data.packing import PackedRow
from megabyte_distill.data.token_bytes import TokenBytes
from megabyte_distill.model.backbone import Backbone
from megabyte_distill.model.router import decide
from megabyte_distill.model.stage_link import StageLink
from megabyte_distill.model.student import Boundaries, Gold, Parts, RouterDecides
from megabyte_distill.objectives.boundary import boundary_bce, boundary_positions, chunk_lengths, f1_pair
from megabyte_distill.objectives.byte_tree import ByteTree
from megabyte_distill.objectives.exact_targets import exact_targets
from megabyte_distill.objectives.joint_ce import joint_bits_pair, joint_nll, joint_nlls
from megabyte_distill.objectives.merged_ce import bytes_and_bit_nll, given_own_bits
from megabyte_distill.objectives.objective import Sums
from megabyte_distill.objectives.truncated_targets import restored
from megabyte_distill.parallel.pipeline import virtual_stages

BYTE_LOSS = "byte ce"
ROUTER_LOSS = "router bce"
MEASURE = "joint bits per byte"
REPLACED = "exact targets replaced"
EXCLUDED = "teacher mass excluded"


def teacher_need(config: StageConfig) -> TeacherNeed:
    """Hard labels and stored targets need no teacher."""
    needs_none = config.byte_targets is ByteTargets.HARD or config.logits_load_dir is not None
    return TeacherNeed.NONE if needs_none else TeacherNeed.FROZEN


class ByteSft:
    """512-way cross-entropy on the next byte and its gold bit; with ``trains_router`` the router's BCE beside it.

    The targets are the text, the teacher's exact distribution, or a mixture; of merged chunks the teacher tells the
    bytes alone. Held-out rows are measured on the text. Of a row with a loss mask the pair (byte, bit) of each marked
    byte counts alone; the router learns and is measured on all bytes, prompts as well, which it has to cut too.
    """

    on_first_stage = False

    def __init__(
        self,
        config: StageConfig,
        teacher: nn.Module | None,
        table: TokenBytes | None,
        *,
        trains_router: bool,
        measure: str = MEASURE,
    ) -> None:
        self.weights = {BYTE_LOSS: 1.0}
        self._measure = measure
        self._parts = Parts.ENCODER | Parts.BACKBONE | Parts.DECODER
        if trains_router:
            self.weights[ROUTER_LOSS] = config.router_loss_weight
            self._parts = Parts.ALL
        gold = config.boundary_source is BoundarySource.GOLD
        self._boundaries: Boundaries = Gold() if gold else RouterDecides()
        self._measures: Sums = {}
        alphas = {ByteTargets.HARD: 0.0, ByteTargets.EXACT: 1.0, ByteTargets.MIXED: config.kd_loss_alpha}
        self._alpha, self._temperature = alphas[config.byte_targets], config.kd_temperature
        self._exact: _TokenModelTargets | _CachedTargets | None = None
        if config.byte_targets is not ByteTargets.HARD:
            assert table is not None
            cached = config.logits_load_dir is not None
            self._exact = _CachedTargets(table) if cached else _TokenModelTargets(teacher, table)

    def counts(self, row: PackedRow) -> dict[str, int]:
        """Positions of each loss: bytes whose prediction is trained, and bytes whose boundary is one, marked or not."""
        counts = {BYTE_LOSS: int(row.trained.sum())}
        if ROUTER_LOSS in self.weights:
            counts[ROUTER_LOSS] = int(boundary_positions(row).sum())
        return counts

    def losses(self, model: nn.Module, row: PackedRow, link: StageLink | None = None) -> dict[str, Tensor]:
        """Sums in nats."""
        exact = self._exact if model.training else None
        done = run_on_stage(
            model,
            row,
            link or StageLink(),
            boundaries=self._boundaries,
            parts=self._parts,
            teacher=None if exact is None else exact.teacher,
        )
        if done is None:
            return {}
        outputs = done.outputs
        assert outputs.logits is not None
        targets = None if exact is None else exact.of(row, done, bare(model).backbone)
        losses = {BYTE_LOSS: self._byte_loss(outputs.logits, row, targets, training=model.training)}
        if ROUTER_LOSS in self.weights:
            assert outputs.p is not None
            mask = boundary_positions(row)
            losses[ROUTER_LOSS] = boundary_bce(outputs.p, row.bits)[mask].sum()
            predicted = decide(outputs.p.detach(), row.byte_ids)
            self._measures.update({"boundary f1": f1_pair(predicted, row), **chunk_lengths(row, predicted)})
        return losses

    def _byte_loss(self, logits: Tensor, row: PackedRow, targets: _Targets | None, *, training: bool) -> Tensor:
        # in training the loss is the last to read the logits
        if targets is None:
            hard = joint_nll(logits, row, overwrite_logits=training)
            self._measures = {self._measure: joint_bits_pair(hard, row), **chunk_lengths(row)}
            return hard[row.trained].sum()
        only_soft = self._alpha == 1.0
        if row.token_bits is None:
            hard, soft = joint_nlls(
                logits,
                row,
                targets.distribution,
                temperature=self._temperature,
                hard_has_gradient=not only_soft,
                overwrite_logits=True,
            )
        else:
            soft = bytes_and_bit_nll(logits, row.labels, given_own_bits(targets.distribution, row))
            hard = joint_nll(logits.detach() if only_soft else logits, row)
        self._measures = {self._measure: joint_bits_pair(hard, row), **targets.measures, **chunk_lengths(row)}
        mixed = soft if only_soft else self._alpha * soft + (1.0 - self._alpha) * hard
        return mixed[row.trained].sum()

    def measures(self) -> Sums:
        """Joint bits per byte of text, the router's F1 where it trains, bytes per chunk there and under merging.

        Of a teacher that runs, the share of bytes whose hard label stands, and its mass on special ids and others that
        cannot be text.
        """
        return self._measures


class _Targets(NamedTuple):
    """What a row's bytes are to be."""

    distribution: Tensor
    """[P, 512]."""
    measures: Sums


class _CachedTargets:
    """Exact byte targets that come with the row."""

    teacher = None

    def __init__(self, table: TokenBytes) -> None:
        self._tree = ByteTree.of(table)

    def of(self, row: PackedRow, done: SideBySide, backbone: Backbone) -> _Targets:
        if self._tree.order.device != row.byte_ids.device:
            self._tree = self._tree.to(row.byte_ids.device)
        return _Targets(restored(self._tree, row), {})


class _TokenModelTargets:
    """Exact byte targets of a token model's states on the gold chunks.

    That is the frozen teacher; without one the student's own backbone and token head, which are frozen then.
    """

    def __init__(self, teacher: nn.Module | None, table: TokenBytes) -> None:
        self.teacher = teacher
        self._table = table
        # of virtual stages the last alone has a head
        self._tree = None if teacher is None else self._tree_of(virtual_stages(teacher)[-1])

    def _tree_of(self, model: Backbone) -> ByteTree:
        return ByteTree.of(self._table, model.columns).to(model.device)

    def of(self, row: PackedRow, done: SideBySide, backbone: Backbone) -> _Targets:
        model = backbone if self.teacher is None else virtual_stages(self.teacher)[-1]
        states = done.outputs.hidden if self.teacher is None else done.teacher
        assert states is not None
        if self._tree is None:
            self._tree = self._tree_of(model)
        with torch.no_grad():
            found = exact_targets(
                self._tree,
                states,
                head=model.own_logits,
                byte_ids=row.byte_ids,
                bits=row.token_ends,
                labels=row.labels,
                wanted=row.trained,
            )
        measures: Sums = {
            REPLACED: (found.replaced, row.trained.sum()),
            EXCLUDED: (found.excluded, found.chunks),
        }
        return _Targets(found.distribution, measures)
