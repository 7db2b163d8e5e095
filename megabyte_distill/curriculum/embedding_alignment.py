"""1a, embedding alignment: the encoder learns to write the teacher's token embeddings. No backbone runs."""

from __future__ import annotations

from functools import cached_property

from torch import Tensor, nn

from megabyte_distill.config.stage import AlignLossScale, StageConfig
from megabyte_distill.curriculum.stage import Stage, TeacherNeed
from megabyte_distill.data.packing import PackedRow
from megabyte_distill.model.backbone import Backbone
from megabyte_distill.model.stage_link import StageLink
from megabyte_distill.model.student import Gold, Parts
from megabyte_distill.objectives.alignment import alignment_squared_error, table_variance
from megabyte_distill.objectives.objective import Sums
from megabyte_distill.parallel.pipeline import virtual_stages

LOSS = "alignment mse"
RELATIVE = "alignment mse relative"


class EmbeddingAlignment:
    """MSE between r at gold ends and the teacher's embedding of the token that ends there."""

    on_first_stage = True

    def __init__(self, config: StageConfig, teacher: nn.Module | None) -> None:
        self.weights = {LOSS: 1.0}
        assert teacher is not None
        self._teacher: Backbone = virtual_stages(teacher)[0]  # the one with the table, where this rank has it
        self._is_relative = config.align_loss_scale is AlignLossScale.TABLE_VARIANCE
        self._measures: Sums = {}

    @cached_property
    def _variance(self) -> float:
        # when it is first needed: a pipeline stage that is not the first has no table
        return float(table_variance(self._teacher.embedding_table, self._teacher.columns))

    def counts(self, row: PackedRow) -> dict[str, int]:
        """Gold ends."""
        return {LOSS: int(row.token_mask.sum())}

    def losses(self, model: nn.Module, row: PackedRow, link: StageLink | None = None) -> dict[str, Tensor]:
        """Summed over gold ends, mean over E, scaled as ``align_loss_scale`` says."""
        chunks = model(row, Gold(), Parts.ENCODER).chunks
        target = self._teacher.embed(row.tokens[row.token_mask]).detach()
        error = alignment_squared_error(chunks[row.token_mask], target).sum()
        self._measures = {RELATIVE: (error.detach() / self._variance, int(target.shape[0]))}
        return {LOSS: error / self._variance if self._is_relative else error}

    def measures(self) -> Sums:
        """MSE over the variance of the teacher's table."""
        return self._measures


STAGE = Stage(
    name="1a",
    title="embedding alignment",
    trains=lambda config, backbone: ("byte_encoder.",),
    teacher=lambda config: TeacherNeed.EMBEDDING,
    objective=lambda config, teacher, table: EmbeddingAlignment(config, teacher),
    measure=RELATIVE,
)
