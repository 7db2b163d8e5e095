"""Student and teacher side by side on one pipeline stage."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from megabyte_distill.data.packing import PackedRow
from megabyte_distill.model.backbone import Backbone
from megabyte_distill.model.stage_link import StageLink
from megabyte_distill.model.student import Boundaries, Parts, Student, StudentOutputs
from megabyte_distill.parallel.pipeline import virtual_stages


class SideBySide(NamedTuple):
    """What both have computed when the pipeline is at its end."""

    outputs: StudentOutputs
    teacher: Tensor | None
    """[M_gold, E] states of the teacher on the gold tokens, after its final norm."""


def bare(model: nn.Module) -> Any:
    """The student inside megatron's wrapper, or itself."""
    return getattr(model, "module", model)


def run_on_stage(
    model: nn.Module,
    row: PackedRow,
    link: StageLink,
    *,
    boundaries: Boundaries,
    parts: Parts,
    teacher: nn.Module | None = None,
) -> SideBySide | None:
    """Run this stage's share of the student and, without gradient, of the teacher on the row's gold tokens.

    ``teacher``: a Backbone, or one cut into virtual stages as the student is. None where the pipeline goes on behind
    this stage: the results are in ``link`` then.
    """
    student: Student = bare(model)
    beside: Backbone | None = None if teacher is None else virtual_stages(teacher)[student.vp_stage]
    carried = replace(student.carried(boundaries, parts), teacher=beside is not None)
    arrived, teacher_state = link.receive(row, student.byte_side_config.backbone_width, carried)
    outputs = model(row, boundaries, parts, arrived)
    if beside is not None:
        with torch.no_grad():
            entering = beside.embed(row.tokens) if teacher_state is None else teacher_state
            teacher_state = beside(entering, row.cu_chunks)
    if link.is_last:
        return SideBySide(outputs, teacher_state)
    link.send(outputs, teacher_state, carried, idle=_idle_embedding(student))
    return None


def _idle_embedding(student: Student) -> Tensor | None:
    """The first stage's copy of a tied embedding that trains: the head on the last stage alone reads it."""
    return student.shared_embedding_or_output_weight() if student.share_embeddings_and_output_weights else None
