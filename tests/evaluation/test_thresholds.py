"""Quality against backbone steps: each line against its own definition."""

from __future__ import annotations

import pytest
import torch

from megabyte_distill.data.chunk_merging import merge_row
from megabyte_distill.data.mock import MockDataset
from megabyte_distill.data.packing import PackedRow
from megabyte_distill.data.sampler import evaluation_rows
from megabyte_distill.evaluation.bits_per_byte import Measures, compare, headline_bits
from megabyte_distill.evaluation.bootstrap import Bootstrap
from megabyte_distill.evaluation.report import table
from megabyte_distill.evaluation.thresholds import sweep
from megabyte_distill.inference.scoring import score_row, segment_texts
from megabyte_distill.model.router import decide
from megabyte_distill.model.student import Given, Parts, RouterDecides, Student
from tests.tiny_student import VOCAB_SIZE, tiny_backbone, tiny_student

pytestmark = pytest.mark.usefixtures("world")
THRESHOLDS = (0.4, 0.5, 0.6)


@pytest.fixture(scope="module")
def rows() -> list[PackedRow]:
    source = MockDataset(VOCAB_SIZE, seed=3, num_documents=9, max_tokens=60)
    return list(evaluation_rows(source, row_bytes=96, chunk_bucket=8))


@pytest.fixture
def student() -> Student:
    torch.manual_seed(0)
    return tiny_student().eval()


def test_every_line_is_its_definition(student: Student, rows: list[PackedRow]) -> None:
    gold, merged, *router = sweep(student, rows, THRESHOLDS, 2.5)
    size = sum(text.shape[0] for row in rows for text in segment_texts(row))

    def bits_per_byte(choice: object) -> float:
        return sum(float(score_row(student, row, choice(row)).bits.sum()) for row in rows) / size  # type: ignore[operator]

    assert [line.bits for line in (gold, merged, *router)] == ["gold", "merged", *["router"] * 3]
    assert gold.bits_per_byte == pytest.approx(bits_per_byte(lambda row: None), rel=1e-6)
    assert merged.bits_per_byte == pytest.approx(bits_per_byte(lambda row: Given(merge_row(row, 2.5).bits)), rel=1e-6)
    for line in router:
        assert line.bits_per_byte == pytest.approx(
            bits_per_byte(lambda row, line=line: RouterDecides(line.threshold)), rel=1e-6
        )
        decided = [
            decide(student(row, parts=Parts.ENCODER | Parts.ROUTER).p, row.byte_ids, line.threshold) for row in rows
        ]
        steps = sum(int((bits & row.is_real).sum()) for bits, row in zip(decided, rows, strict=True))
        segments = sum(len(row.documents) for row in rows)
        assert line.backbone_steps_per_byte == pytest.approx(steps / size)
        assert line.bytes_per_chunk == pytest.approx(size / (steps - segments))
    assert gold.gold_f1 == 1.0 and merged.merged_f1 == 1.0 and gold.merged_f1 is not None and gold.merged_f1 < 1.0
    lengths = [line.bytes_per_chunk for line in router]
    assert lengths == sorted(lengths) and lengths[0] < lengths[-1]


def test_a_comparison_has_the_table_and_its_headline_the_threshold(student: Student, rows: list[PackedRow]) -> None:
    measures = Measures(paths=0, threshold=0.6, thresholds=(0.6,), bootstrap=Bootstrap(resamples=0))
    found = compare(student, tiny_backbone(), {"": rows}, measures)
    line = found.thresholds[-1]
    assert found.total.router_bits_per_byte == pytest.approx(line.bits_per_byte)
    assert found.total.router_bytes_per_chunk == pytest.approx(line.bytes_per_chunk)
    assert found.total.boundary_f1 == pytest.approx(line.gold_f1) and line.merged_f1 is None
    printed = table(found)
    assert "router, p > 0.6" in printed and "steps/byte" in printed


def test_a_student_of_merged_chunks_is_judged_by_them(student: Student, rows: list[PackedRow]) -> None:
    measures = Measures(paths=0, bits=headline_bits(2.5), merge_limit=2.5, thresholds=(0.5,))
    found = compare(student, tiny_backbone(), {"": rows}, measures)
    gold, merged, router = found.thresholds
    total = found.total
    assert total.student_bits_per_byte == total.merged_bits_per_byte == pytest.approx(merged.bits_per_byte)
    assert total.retention == pytest.approx(total.teacher_bits_per_byte / merged.bits_per_byte)
    assert total.boundary_f1 == pytest.approx(router.merged_f1) and total.boundary_f1 != pytest.approx(router.gold_f1)
    assert total.bytes_per_chunk == pytest.approx(merged.bytes_per_chunk) and gold.bytes_per_chunk < 2.2
    printed = table(found)
    assert "student, merged bits" in printed and "note: the student was taught chunks of several tokens" in printed
