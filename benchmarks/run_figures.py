"""What a run reached on held-out text: its encoder and router behind stage 1, the student behind stage 2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megabyte_distill.data.dataset import ByteTokenDataset
from megabyte_distill.data.packing import PackedRow
from megabyte_distill.evaluation.anchors import score_constant_embedding, token_counts, unigram_nll
from megabyte_distill.evaluation.bits_per_byte import evaluate_run
from megabyte_distill.evaluation.held_out import held_out_rows
from megabyte_distill.inference.scoring import score_tokens
from megabyte_distill.model.router import decide
from megabyte_distill.model.student import Gold, Parts
from megabyte_distill.objectives.alignment import alignment_squared_error, table_variance
from megabyte_distill.objectives.boundary import boundary_counts
from megabyte_distill.parallel.process_groups import current_world
from megabyte_distill.runs import load_run_teacher, load_student, load_students

ROW_BYTES = 2048
"""The context of teacher and student in all figures."""


def figure_rows(stem: str, max_bytes: int) -> list[PackedRow]:
    """The rows of a held-out data set that figures are taken on."""
    return held_out_rows([ByteTokenDataset(stem)], row_bytes=ROW_BYTES, max_bytes=max_bytes)


@torch.no_grad()
def measure_stage1(run: Path, rows: Sequence[PackedRow], stages: Sequence[str]) -> dict[str, float]:
    """Held-out figures of stage 1: the untrained teacher reading the encoder as 1a left it, the router's ends after 1c.

    A stage that is not among ``stages`` has no figures. Needs process groups.
    """
    sums: dict[str, float] = {}

    def add(**values: Any) -> None:
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + float(value)

    device = current_world().device
    teacher = load_run_teacher(run).backbone.to(device)
    encoder = load_student(run, "1a").student if "1a" in stages else None
    router = load_student(run, "1c").student if "1c" in stages else None
    for row in (row.to(device) for row in rows):
        own = score_tokens(teacher, row)
        add(bytes=own.bytes.sum(), own=own.bits.sum(), nothing=score_constant_embedding(teacher, row).bits.sum())
        if encoder is not None:
            chunks = encoder(row, Gold(), Parts.ENCODER).chunks
            error = alignment_squared_error(chunks, teacher.embed(row.tokens))[row.token_mask]
            add(read=score_tokens(teacher, row, chunks).bits.sum(), error=error.double().sum(), tokens=len(error))
        if router is not None:
            p = router(row, Gold(), Parts.ENCODER | Parts.ROUTER).p
            add(**boundary_counts(decide(p, row.byte_ids, official=router.is_official), row))
    variance = float(table_variance(teacher.embedding_table, teacher.columns))
    return stage1_figures(sums, variance)


def stage1_figures(sums: Mapping[str, float], variance: float) -> dict[str, float]:
    """Of the sums over held-out text; ``variance``: of the teacher's embedding table."""
    size = sums["bytes"]
    found = {
        "text_bytes": size,
        "teacher_bits_per_byte": sums["own"] / size,
        "constant_embedding_bits_per_byte": sums["nothing"] / size,
    }
    if "read" in sums:
        found |= {
            "reading_bits_per_byte": sums["read"] / size,
            "reading_retention": sums["own"] / sums["read"],
            "alignment_mse_relative": sums["error"] / sums["tokens"] / variance,
        }
    if "gold" in sums:
        found |= {
            "boundary_precision": sums["hits"] / max(sums["predicted"], 1.0),
            "boundary_recall": sums["hits"] / sums["gold"],
            "boundary_f1": 2 * sums["hits"] / (sums["predicted"] + sums["gold"]),
        }
    return found


def measure_student(run: Path, rows: Sequence[PackedRow], train: str) -> dict[str, Any]:
    """The figures of tools/evaluate.py, but for those by paths; needs process groups."""
    students = load_students(run)
    training = ByteTokenDataset(train)
    found = evaluate_run(
        students.last.student,
        load_run_teacher(run).backbone,
        rows,
        stage1_student=students.distilled,
        aligned_student=students.aligned,
        unigram=unigram_nll(token_counts([training]), students.last.token_bytes),
        paths=0,
    )
    return found.as_dict()
