"""3a: only what the loss mask marks is trained, measured and counted."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from megabyte_distill.alphabet import BOS_BYTE, END_OF_DOCUMENT_CLASS
from megabyte_distill.config.stage import BoundarySource, StageConfig
from megabyte_distill.curriculum.dialogue_sft import MEASURE
from megabyte_distill.curriculum.stages import STAGES
from megabyte_distill.data.chunk_merging import merge_row
from megabyte_distill.data.micro_batch import concatenate_rows
from megabyte_distill.data.packing import PackedRow
from megabyte_distill.model.router import decide
from megabyte_distill.model.student import Given, Student
from megabyte_distill.parallel.process_groups import World
from megabyte_distill.training.loop import averages
from megabyte_distill.training.optimizer import wrap_for_training
from megabyte_distill.training.step import evaluate, train_step
from tests.tiny_student import assert_same, gradients, random_rows, tiny_student

STAGE = STAGES["3a"]


def marked_rows(count: int = 6) -> list[PackedRow]:
    return random_rows(count, marked=True, seed=4)


def by_hand(student: Student, row: PackedRow, bits: torch.Tensor) -> dict[str, float]:
    """Position by position: byte and bit of each marked byte, and each cut, marked or not."""
    assert row.marked is not None
    outputs = student(row, Given(bits))
    p, log_p = student(row).p, outputs.logits.log_softmax(-1)
    segment_ends = {int(end) - 1 for end in row.cu_seqlens[1:]}
    sums = {"byte ce": 0.0, "router bce": 0.0, "bits": 0.0, "bytes": 0.0}
    for place in row.marked.nonzero()[:, 0].tolist():
        label = int(row.labels[place])
        nll = -float(log_p[place, label])
        sums["byte ce"] += nll
        if place not in segment_ends and label != END_OF_DOCUMENT_CLASS:
            sums["bits"], sums["bytes"] = sums["bits"] + nll / math.log(2), sums["bytes"] + 1
    for place in row.is_real.nonzero()[:, 0].tolist():
        if place not in segment_ends:
            sums["router bce"] -= math.log(float(p[place] if row.bits[place] else 1 - p[place]))
    return sums


@pytest.mark.parametrize("source", BoundarySource)
def test_losses_and_measure_are_the_sums_over_marked_bytes(world: World, source: BoundarySource) -> None:
    student = tiny_student().eval()
    objective = STAGE.objective(StageConfig(boundary_source=source), None, None)
    for row in [*marked_rows(), concatenate_rows(marked_rows(3)), merge_row(marked_rows(1)[0], 2.5)]:
        with torch.no_grad():
            decided = decide(student(row).p, row.byte_ids)
            decided = torch.where(row.is_real, decided, row.bits)
            expected = by_hand(student, row, row.bits if source is BoundarySource.GOLD else decided)
            losses = objective.losses(student, row)
        assert {name: float(loss) for name, loss in losses.items()} == {
            name: pytest.approx(expected[name], rel=1e-4) for name in ("byte ce", "router bce")
        }
        bits, size = objective.measures()[MEASURE]
        assert float(bits) == pytest.approx(expected["bits"], rel=1e-5) and size == expected["bytes"]
        counts = objective.counts(row)
        assert 0 < counts["byte ce"] == int(row.trained.sum()) < int(row.is_real.sum())


def test_what_is_not_marked_has_no_part_in_loss_and_gradient(world: World) -> None:
    """Other labels there change nothing, and marking everything is 2b on hard labels."""
    student, row = tiny_student(), marked_rows(1)[0]
    config = StageConfig()
    objective = STAGE.objective(config, None, None)

    def of(row: PackedRow, name: str = "3a") -> dict[str, torch.Tensor]:
        stage = objective if name == "3a" else STAGES[name].objective(config, None, None)
        return gradients(student, lambda: torch.stack([*stage.losses(student, row).values()]).sum())

    assert row.marked is not None
    others = torch.where(row.marked, row.labels, (row.labels + 7) % 256)
    found = of(row)
    assert_same(of(replace(row, labels=others)), found)
    whole = of(replace(row, marked=row.is_real))
    assert_same(whole, of(replace(row, marked=None), "2b"))
    assert any(not torch.equal(whole[name], found[name]) for name in found)


def test_an_update_is_normalised_by_all_its_marked_bytes(world: World) -> None:
    """Micro-batches with many, few and no marked bytes have together the gradient of one long micro-batch."""
    rows = marked_rows(4)
    assert rows[1].marked is not None and rows[2].marked is not None
    rows[1] = replace(rows[1], marked=torch.zeros_like(rows[1].marked))
    rows[2] = replace(rows[2], marked=rows[2].marked & (rows[2].marked.cumsum(0) == 1))
    config = StageConfig(lr=0.0, weight_decay=0.0, clip_grad=0.0)
    found = {}
    for name, batch in (("apart", rows), ("together", [concatenate_rows(rows)]), ("nothing", [rows[1]] * 2)):
        torch.manual_seed(5)
        student = tiny_student()
        trained = wrap_for_training(student, student.config, config)
        objective = STAGE.objective(config, None, None)
        report = train_step(trained, objective, batch, 0, world)
        assert not report.skipped and math.isfinite(report.grad_norm)
        found[name] = report
        held_out = averages(evaluate(student, objective, [batch], world))
        assert all(map(math.isfinite, (*held_out.values(), *averages(report.sums).values())))
        assert (MEASURE in held_out) is (name != "nothing")
    assert found["apart"].grad_norm == pytest.approx(found["together"].grad_norm, rel=1e-5)
    assert found["apart"].grad_norm > 0
    assert found["apart"].sums["byte ce"] == pytest.approx(found["together"].sums["byte ce"], rel=1e-5)
    assert found["nothing"].sums["byte ce"] == (0, 0)


def test_bos_predicts_an_answer_that_begins_a_row(world: World) -> None:
    """A row that begins inside an answer trains its first byte, which BOS stands in front of."""
    student = tiny_student().eval()
    objective = STAGE.objective(StageConfig(), None, None)
    row = next(row for row in random_rows(60, marked=True) if row.marked is not None and row.marked[0])
    assert row.marked is not None and int(row.byte_ids[0]) == BOS_BYTE
    without = replace(row, marked=row.marked & (torch.arange(row.marked.numel()) > 0))
    with torch.no_grad():
        on, off = (float(objective.losses(student, given)["byte ce"]) for given in (row, without))
        first = -float(student(row, Given(row.bits)).logits.log_softmax(-1)[0, row.labels[0]])
    assert first > 1 and on - off == pytest.approx(first, rel=1e-3)
    assert objective.counts(row)["byte ce"] == objective.counts(without)["byte ce"] + 1
