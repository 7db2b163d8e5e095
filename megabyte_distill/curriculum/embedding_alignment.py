"""1a, embedding alignment: the encoder learns to write the teacher's token embeddings.

No backbone runs but for ``align_layers``: the encoder's states go through the teacher's first layers as well, and are
compared with what the teacher makes there of its own embeddings. Bolmo (arXiv 2512.15586) does so behind the fourth
layer, and compares nothing in front of it.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor, nn

from megabyte_distill.config.stage import AlignLossScale, StageConfig
from megabyte_distill.curriculum.stage import Stage, TeacherNeed
from megabyte_distill.data.packing import PackedRow
from megabyte_distill.model.backbone import Backbone
from megabyte_distill.model.stage_link import StageLink
from megabyte_distill.model.student import Gold, Parts
from megabyte_distill.objectives.alignment import alignment_squared_error, mean_square, table_variance
from megabyte_distill.objectives.objective import Sums
from megabyte_distill.parallel.pipeline import virtual_stages

LOSS = "alignment mse"
RELATIVE = "alignment mse relative"
LAYERS_LOSS = "layers mse"
LAYERS_RELATIVE = "layers mse relative"


class EmbeddingAlignment:
    """MSE between r at gold ends and the teacher's embedding of the token that ends there; the same behind layers."""

    on_first_stage = True

    def __init__(self, config: StageConfig, teacher: nn.Module | None) -> None:
        self.weights = {LOSS: 1.0}
        self._layers = config.align_layers
        if self._layers:
            self.weights[LAYERS_LOSS] = config.align_layers_loss_weight
        assert teacher is not None
        # the one with the table and the first layers, where this rank has them
        self._teacher: Backbone = virtual_stages(teacher)[0]
        self._is_relative = config.align_loss_scale is AlignLossScale.TABLE_VARIANCE
        self._measures: Sums = {}

    @cached_property
    def _variance(self) -> float:
        # when it is first needed: a pipeline stage that is not the first has no table
        return float(table_variance(self._teacher.embedding_table, self._teacher.columns))

    def counts(self, row: PackedRow) -> dict[str, int]:
        """Gold ends."""
        return dict.fromkeys(self.weights, int(row.token_mask.sum()))

    def losses(self, model: nn.Module, row: PackedRow, link: StageLink | None = None) -> dict[str, Tensor]:
        """Summed over gold ends, mean over E, scaled as ``align_loss_scale`` says."""
        chunks = model(row, Gold(), Parts.ENCODER).chunks
        embedded = self._teacher.embed(row.tokens).detach()
        target = embedded[row.token_mask]
        error = alignment_squared_error(chunks[row.token_mask], target).sum()
        self._measures = {RELATIVE: (error.detach() / self._variance, int(target.shape[0]))}
        losses = {LOSS: error / self._variance if self._is_relative else error}
        if self._layers:
            losses[LAYERS_LOSS] = self._behind_layers(chunks, embedded, row)
        return losses

    def _behind_layers(self, chunks: Tensor, embedded: Tensor, row: PackedRow) -> Tensor:
        with torch.no_grad():
            wanted = self._teacher.first_layers(embedded, row.cu_chunks, self._layers)[row.token_mask]
        got = self._teacher.first_layers(chunks, row.cu_chunks, self._layers)[row.token_mask]
        error = alignment_squared_error(got, wanted)
        # each by its own state's scale: one variance for all would have to be taken over all rows and ranks, and in
        # many teachers the few states behind BOS, far larger than the others, would decide it
        relative = error / mean_square(wanted)
        self._measures[LAYERS_RELATIVE] = relative.detach().sum(), int(wanted.shape[0])
        return (relative if self._is_relative else error).sum()

    def measures(self) -> Sums:
        """MSE over the variance of the teacher's table; behind layers, over each teacher state's mean square."""
        return self._measures


STAGE = Stage(
    name="1a",
    title="embedding alignment",
    trains=lambda config, backbone: ("byte_encoder.",),
    teacher=lambda config: TeacherNeed.BEGINNING,
    objective=lambda config, teacher, table: EmbeddingAlignment(config, teacher),
    measure=RELATIVE,
)
