"""The figures of an evaluation: each against its own definition, on rows that are padded and cut."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from megabyte_distill.alphabet import BOS_BYTE
from megabyte_distill.config.model import DechunkMode
from megabyte_distill.data.mock import MockDataset, mock_table
from megabyte_distill.data.packing import PackedRow
from megabyte_distill.data.sampler import evaluation_rows
from megabyte_distill.evaluation.anchors import score_constant_embedding, score_unigram, unigram_nll
from megabyte_distill.evaluation.bits_per_byte import evaluate_run
from megabyte_distill.inference.scoring import score_paths, score_row, score_tokens, segment_texts
from megabyte_distill.model.backbone import Backbone
from megabyte_distill.model.router import decide
from megabyte_distill.model.student import Parts, RouterDecides, Student
from tests.tiny_student import VOCAB_SIZE, tiny_backbone, tiny_student

pytestmark = pytest.mark.usefixtures("world")
DOCUMENTS = 9


@pytest.fixture(scope="module")
def rows() -> list[PackedRow]:
    source = MockDataset(VOCAB_SIZE, seed=3, num_documents=DOCUMENTS, max_tokens=60)
    return list(evaluation_rows(source, row_bytes=96, chunk_bucket=8))


@pytest.fixture
def student() -> Student:
    return tiny_student().eval()


@pytest.fixture
def teacher() -> Backbone:
    return tiny_backbone()


def test_every_figure_is_its_definition(student: Student, teacher: Backbone, rows: list[PackedRow]) -> None:
    result = evaluate_run(student, teacher, rows, paths=0)
    size = sum(text.shape[0] for row in rows for text in segment_texts(row))
    assert result.text_bytes == size and result.documents == DOCUMENTS and result.paths is None

    def total(score: object) -> float:
        return sum(float(score(row).bits.sum()) for row in rows) / size  # type: ignore[operator]

    assert result.student_bits_per_byte == pytest.approx(total(lambda row: score_row(student, row)), rel=1e-6)
    assert result.router_bits_per_byte == pytest.approx(
        total(lambda row: score_row(student, row, RouterDecides())), rel=1e-6
    )
    assert result.teacher_bits_per_byte == pytest.approx(total(lambda row: score_tokens(teacher, row)), rel=1e-6)
    assert result.constant_embedding_bits_per_byte == pytest.approx(
        total(lambda row: score_constant_embedding(teacher, row)), rel=1e-6
    )
    assert result.retention == pytest.approx(result.teacher_bits_per_byte / result.student_bits_per_byte)
    assert result.gap_bits_per_byte == pytest.approx(result.student_bits_per_byte - result.teacher_bits_per_byte)
    assert result.stage1_retention == pytest.approx(result.teacher_bits_per_byte / result.stage1_bits_per_byte)
    tokens = sum(int(row.token_mask.sum()) - len(row.documents) for row in rows)
    assert result.bytes_per_chunk == pytest.approx(size / tokens)


def test_boundaries_are_counted_where_they_are_predictions(
    student: Student, teacher: Backbone, rows: list[PackedRow]
) -> None:
    hits = predicted = gold = 0
    for row in rows:
        p = student(row, parts=Parts.ENCODER | Parts.ROUTER).p
        guess = decide(p, row.byte_ids)
        edges = set(row.cu_seqlens.tolist())
        for t in range(row.byte_ids.shape[0]):
            if bool(row.is_real[t]) and int(row.byte_ids[t]) != BOS_BYTE and t + 1 not in edges:
                hits += bool(guess[t] & row.bits[t])
                predicted += bool(guess[t])
                gold += bool(row.bits[t])
    result = evaluate_run(student, teacher, rows, paths=0)
    assert result.boundary_precision == pytest.approx(hits / predicted)
    assert result.boundary_recall == pytest.approx(hits / gold)
    assert result.boundary_f1 == pytest.approx(2 * hits / (predicted + gold))


def test_a_student_that_writes_the_teachers_embeddings_retains_everything(
    student: Student, rows: list[PackedRow]
) -> None:
    """The encoder is replaced by a table of the right answers: alignment 0, stage 1 retention 1."""
    host = student.backbone
    assert isinstance(host, Backbone)

    class Perfect(torch.nn.Module):
        def mix(self, byte_ids: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
            row = next(row for row in rows if torch.equal(row.byte_ids, byte_ids))
            r = torch.zeros(byte_ids.shape[0], host.backbone_config.hidden_size)
            ends = (row.bits & row.is_real).nonzero()[:, 0]
            r[ends] = host.embed(row.tokens[row.token_mask]).detach()
            return r

        def project(self, x: torch.Tensor) -> torch.Tensor:
            return x

    perfect = tiny_student().eval()
    perfect.backbone, perfect.byte_encoder = host, Perfect()  # type: ignore[assignment]
    result = evaluate_run(student, host, rows, stage1_student=perfect, paths=0)
    assert result.alignment_mse_relative == pytest.approx(0.0, abs=1e-9)
    assert result.stage1_retention == pytest.approx(1.0, rel=1e-5)


def test_paths_are_compared_on_the_same_text(student: Student, teacher: Backbone, rows: list[PackedRow]) -> None:
    figures = evaluate_run(student, teacher, rows, paths=3, path_bytes=10**6).paths
    assert figures is not None and figures.paths == 3
    texts = [segment_texts(row)[0] for row in rows]
    texts = [text for text in texts if text.shape[0]]
    assert figures.text_bytes == sum(text.shape[0] for text in texts)
    expected = float(score_paths(student, texts, paths=3).bits.sum()) / figures.text_bytes
    assert figures.bits_per_byte == pytest.approx(expected, rel=1e-5)
    gold = sum(float(score_row(student, row).bits[0]) for row in rows) / figures.text_bytes
    tokens = sum(float(score_tokens(teacher, row).bits[0]) for row in rows) / figures.text_bytes
    assert figures.gold_bits_per_byte == pytest.approx(gold, rel=1e-5)
    assert figures.teacher_bits_per_byte == pytest.approx(tokens, rel=1e-5)


def test_paths_are_left_out_in_official_mode(teacher: Backbone, rows: list[PackedRow]) -> None:
    assert evaluate_run(tiny_student(mode=DechunkMode.OFFICIAL).eval(), teacher, rows).paths is None


def test_the_unigram_anchor_is_the_entropy_of_its_own_counts(rows: list[PackedRow]) -> None:
    table = mock_table(VOCAB_SIZE)
    counts = np.arange(VOCAB_SIZE, dtype=np.int64)
    nll = unigram_nll(counts, table)
    assert float((-nll).exp().sum()) == pytest.approx(1.0, rel=1e-5)
    assert math.isinf(float(nll[0]))  # the id that only marks documents
    score = score_unigram(nll, rows[0])
    edges = rows[0].cu_chunks.tolist()
    labels = rows[0].token_labels[edges[0] : edges[1] - 1]
    assert float(score.bits[0]) == pytest.approx(float(nll[labels].sum()) / math.log(2), rel=1e-5)


def test_padding_ids_behind_the_tokenizers_own_are_no_text() -> None:
    nll = unigram_nll(np.ones(VOCAB_SIZE, dtype=np.int64), mock_table(VOCAB_SIZE).padded(VOCAB_SIZE + 38))
    assert nll.shape == (VOCAB_SIZE + 38,) and bool(nll[VOCAB_SIZE:].isinf().all())


def test_a_constant_embedding_knows_nothing_of_the_text(teacher: Backbone, rows: list[PackedRow]) -> None:
    row = max(rows, key=lambda row: len(row.documents))
    shuffled = replace(row, tokens=torch.where(row.token_mask, row.tokens.flip(0), row.tokens))
    assert torch.equal(score_constant_embedding(teacher, row).bits, score_constant_embedding(teacher, shuffled).bits)


def test_the_result_is_plain_json(student: Student, teacher: Backbone, rows: list[PackedRow]) -> None:
    result = evaluate_run(student, teacher, rows, path_bytes=10).as_dict()
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert {"teacher_bits_per_byte", "student_bits_per_byte", "retention", "stage1_retention", "boundary_f1",
            "alignment_mse_relative"} <= result.keys()  # fmt: skip


def test_rows_without_text_are_refused(student: Student, teacher: Backbone) -> None:
    empty = list(
        evaluation_rows(MockDataset(VOCAB_SIZE, seed=0, num_documents=3, max_tokens=0), row_bytes=32, chunk_bucket=1)
    )
    with pytest.raises(ValueError, match="not one byte of text"):
        evaluate_run(student, teacher, empty, paths=0)
