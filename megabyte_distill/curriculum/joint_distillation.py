"""1b, joint distillation: gold chunks through the student's backbone, against the teacher on the gold tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from megabyte_distill.config.model import BackboneConfig
from megabyte_distill.config.stage import StageConfig
from megabyte_distill.curriculum.on_stage import bare, run_on_stage
from megabyte_distill.curriculum.stage import Stage, TeacherNeed
from megabyte_distill.data.packing import PackedRow
from megabyte_distill.data.text_mask import text_chunks, text_positions
from megabyte_distill.model.backbone import Backbone
from megabyte_distill.model.stage_link import StageLink
from megabyte_distill.model.student import Gold, Parts
from megabyte_distill.objectives.objective import Sums
from megabyte_distill.objectives.token_kl import reverse_kl
from megabyte_distill.parallel.pipeline import virtual_stages
from megabyte_distill.parallel.vocabulary import VocabularyColumns

LOSS = "reverse kl"
MEASURE = "bits per byte"


class JointDistillation:
    """Reverse KL over the whole vocabulary at every chunk; no hard labels."""

    on_first_stage = False

    def __init__(self, config: StageConfig, teacher: nn.Module | None) -> None:
        self.weights = {LOSS: 1.0}
        assert teacher is not None
        self._teacher = teacher
        self._measures: Sums = {}

    def counts(self, row: PackedRow) -> dict[str, int]:
        """Gold chunks."""
        return {LOSS: int(row.token_mask.sum())}

    def losses(self, model: nn.Module, row: PackedRow, link: StageLink | None = None) -> dict[str, Tensor]:
        """Summed over gold chunks, in nats."""
        done = run_on_stage(
            model,
            row,
            link or StageLink(),
            boundaries=Gold(),
            parts=Parts.ENCODER | Parts.BACKBONE,
            teacher=self._teacher,
        )
        if done is None:
            return {}
        student: Backbone = bare(model).backbone
        teacher: Backbone = virtual_stages(self._teacher)[-1]
        assert done.outputs.hidden is not None and done.teacher is not None
        with torch.no_grad():
            wanted = teacher.own_logits(done.teacher)
        logits, columns = student.own_logits(done.outputs.hidden), student.columns
        kl = reverse_kl(logits, wanted, columns)
        self._measures = {} if model.training else _bits_per_byte(logits, wanted, columns, row)
        return {LOSS: kl[row.token_mask].sum()}

    def measures(self) -> Sums:
        """In evaluation: bits per byte of text, student's and teacher's, on the gold tokens."""
        return self._measures


@torch.no_grad()
def _bits_per_byte(student: Tensor, teacher: Tensor, columns: VocabularyColumns, row: PackedRow) -> Sums:
    mask, size = text_chunks(row), int(text_positions(row).sum())

    def nll(logits: Tensor) -> Tensor:
        return -columns.of_labels(columns.log_softmax(logits.float()), row.token_labels)

    return {
        name: (nll(logits)[mask].double().sum() / math.log(2), size)
        for name, logits in ((MEASURE, student), ("teacher bits per byte", teacher))
    }


def _trains(config: StageConfig, backbone: BackboneConfig) -> tuple[str, ...]:
    if config.freeze_backbone:
        return ("byte_encoder.",)
    # a tied head is the embedding table; an untied table is not on the byte path and would only decay
    head = "backbone.embedding." if backbone.tied_embeddings else "backbone.output_layer."
    return ("byte_encoder.", "backbone.decoder.", head)


STAGE = Stage(
    name="1b",
    title="joint distillation",
    trains=_trains,
    teacher=lambda config: TeacherNeed.FROZEN,
    objective=lambda config, teacher, table: JointDistillation(config, teacher),
    measure=MEASURE,
)
