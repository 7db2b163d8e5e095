"""Several data sets side by side: each a row, the total their sum, intervals over documents, next bytes."""

from __future__ import annotations

import json

import pytest
import torch

from megabyte_distill.data.chunk_merging import merge_row
from megabyte_distill.data.mock import MockDataset, mock_table
from megabyte_distill.data.packing import PackedRow
from megabyte_distill.data.sampler import evaluation_rows
from megabyte_distill.data.text_mask import text_positions
from megabyte_distill.evaluation import report
from megabyte_distill.evaluation.bits_per_byte import Comparison, Measures, compare, evaluate_run
from megabyte_distill.evaluation.bootstrap import Bootstrap
from megabyte_distill.evaluation.comparison_plots import plot_sets
from megabyte_distill.evaluation.document_counts import Bits
from megabyte_distill.evaluation.held_out import openings
from megabyte_distill.inference.scoring import score_official, segment_texts
from megabyte_distill.inference.tokenizations import score_tokenizations
from megabyte_distill.model.backbone import Backbone
from megabyte_distill.model.student import Given, Gold, RouterDecides, Student
from tests.tiny_student import VOCAB_SIZE, tiny_backbone, tiny_student

pytestmark = pytest.mark.usefixtures("world")


def rows_of(seed: int, documents: int) -> list[PackedRow]:
    source = MockDataset(VOCAB_SIZE, seed=seed, num_documents=documents, max_tokens=60)
    return list(evaluation_rows(source, row_bytes=96, chunk_bucket=8))


@pytest.fixture(scope="module")
def sets() -> dict[str, list[PackedRow]]:
    return {"one": rows_of(3, 9), "two": rows_of(4, 5)}


@pytest.fixture(scope="module")
def student(world: object) -> Student:
    torch.manual_seed(1)
    return tiny_student().eval()


@pytest.fixture(scope="module")
def teacher(world: object) -> Backbone:
    torch.manual_seed(2)
    return tiny_backbone()


@pytest.fixture(scope="module")
def found(student: Student, teacher: Backbone, sets: dict[str, list[PackedRow]]) -> Comparison:
    measures = Measures(paths=2, path_bytes=200, tokenizations=3, bootstrap=Bootstrap(resamples=200))
    return compare(student, teacher, sets, measures, token_bytes=mock_table(VOCAB_SIZE))


def test_each_set_is_what_it_is_alone(
    found: Comparison, student: Student, teacher: Backbone, sets: dict[str, list[PackedRow]]
) -> None:
    for name, rows in sets.items():
        alone, part = evaluate_run(student, teacher, rows, paths=0).as_dict(), found.sets[name].as_dict()
        for figure in alone.keys() - {
            "paths",
            "intervals",
            "teacher_next_byte_accuracy",
            "teacher_exact_bits_per_byte",
        }:
            assert part[figure] == alone[figure], figure


def test_the_total_is_the_sum_of_the_sets(found: Comparison) -> None:
    parts, total = list(found.sets.values()), found.total
    assert total.documents == 14 and total.text_bytes == sum(part.text_bytes for part in parts)
    for name in ("teacher_bits_per_byte", "student_bits_per_byte", "router_bits_per_byte", "next_byte_accuracy"):
        weighted = sum(getattr(part, name) * part.text_bytes for part in parts) / total.text_bytes
        assert getattr(total, name) == pytest.approx(weighted)
    assert total.paths is not None and total.paths.text_bytes == sum(part.paths.text_bytes for part in parts)  # type: ignore[union-attr]
    bits = [part.paths.bits_per_byte for part in parts if part.paths is not None]
    assert min(bits) <= total.paths.bits_per_byte <= max(bits)


def test_several_tokenizations_are_no_dearer_than_the_teachers_own(
    found: Comparison, teacher: Backbone, sets: dict[str, list[PackedRow]]
) -> None:
    texts = [text for row in openings(sets["two"], 100) for text in segment_texts(row)]
    figures = found.sets["two"].paths
    assert figures is not None and figures.text_bytes == sum(text.shape[0] for text in texts)
    tokens = [row.tokens[1:].tolist() for row in openings(sets["two"], 100)]
    score = score_tokenizations(teacher, mock_table(VOCAB_SIZE), texts, paths=3, canonical=tokens)
    several = figures.teacher_tokenizations_bits_per_byte
    assert several == pytest.approx(float(score.prefix_bits.sum()) / figures.text_bytes)
    assert several is not None and several < figures.teacher_bits_per_byte
    total, other = found.total.paths, found.sets["one"].paths
    assert total is not None and other is not None and "3 tokenizations" in report.table(found)
    mean = several * figures.text_bytes + other.teacher_tokenizations_bits_per_byte * other.text_bytes  # type: ignore[operator]
    assert total.teacher_tokenizations_bits_per_byte == pytest.approx(mean / total.text_bytes)


def test_intervals_hold_the_figures(found: Comparison) -> None:
    for name in ("teacher_bits_per_byte", "student_bits_per_byte", "retention", "boundary_f1", "next_byte_accuracy"):
        low, high = found.total.intervals[name]
        assert low < getattr(found.total, name) < high


@pytest.mark.parametrize("bits", list(Bits))
def test_next_bytes_are_told_under_the_chosen_bits(
    student: Student, teacher: Backbone, sets: dict[str, list[PackedRow]], bits: Bits
) -> None:
    right = size = 0
    for row in sets["one"]:
        choice = {Bits.GOLD: Gold(), Bits.ROUTER: RouterDecides(), Bits.MERGED: Given(merge_row(row, 2.5).bits)}[bits]
        logits = student(row, choice).logits
        chances = logits.softmax(-1)
        guess = (chances[:, :256] + chances[:, 256:]).argmax(-1)
        mask = text_positions(row)
        right += int((guess == row.labels % 256)[mask].sum())
        size += int(mask.sum())
    part = compare(student, teacher, {"one": sets["one"]}, Measures(bits=bits, paths=0, merge_limit=2.5)).total
    assert part.next_byte_accuracy == pytest.approx(right / size)
    assert part.student_bits_per_byte == getattr(part, f"{bits.value}_bits_per_byte")
    each = {part.gold_bits_per_byte, part.router_bits_per_byte, part.merged_bits_per_byte}
    assert len(each) == 3 and None not in each
    assert part.teacher_next_byte_accuracy is None


def test_the_teachers_next_byte_is_that_of_its_summed_tokens(
    teacher: Backbone, found: Comparison, sets: dict[str, list[PackedRow]]
) -> None:
    """By brute force over the vocabulary: tokens that spell on what is there, by their next byte."""
    table = mock_table(VOCAB_SIZE)
    words = [table[token] for token in range(VOCAB_SIZE)]
    right = 0
    for row in sets["two"]:
        chances = teacher.logits(teacher(teacher.embed(row.tokens), row.cu_chunks)).softmax(-1).tolist()
        chunk, begun = -1, b""
        for place in range(row.byte_ids.shape[0]):
            chunk, begun = (chunk + 1, b"") if row.bits[place] else (chunk, begun + bytes([int(row.byte_ids[place])]))
            if not bool(text_positions(row)[place]):
                continue
            mass = [0.0] * 256
            for token, word in enumerate(words):
                if len(word) > len(begun) and word.startswith(begun):
                    mass[word[len(begun)]] += chances[chunk][token]
            mass[254] = 0.0 if begun else chances[chunk][0]
            right += mass.index(max(mass)) == int(row.labels[place]) % 256
    part = found.sets["two"]
    assert part.teacher_next_byte_accuracy == pytest.approx(right / part.text_bytes)


def test_the_official_score_is_added_where_asked_for(
    student: Student, teacher: Backbone, sets: dict[str, list[PackedRow]], found: Comparison
) -> None:
    part = compare(student, teacher, {"two": sets["two"]}, Measures(official=True, paths=0))
    bits = sum(float(score_official(student, row).bits.sum()) for row in sets["two"])
    assert part.total.official_bits_per_byte == pytest.approx(bits / part.total.text_bytes)
    assert part.total.official_retention == pytest.approx(
        part.total.teacher_bits_per_byte * part.total.text_bytes / bits
    )
    assert part.total.student_bits_per_byte == found.sets["two"].student_bits_per_byte
    assert any("official score is no bound" in note for note in report.notes(part))
    assert "official score" in report.table(part) and found.total.official_retention is None


def test_what_must_be_said_is_said(student: Student, teacher: Backbone, sets: dict[str, list[PackedRow]]) -> None:
    """A teacher that is worse than the student, one document, no anchor."""
    better = compare(student, teacher, {"x": rows_of(5, 1)}, Measures(paths=0))
    assert better.total.retention < 1 and not [note for note in report.notes(better) if "retention" in note]
    with torch.no_grad():
        worse = tiny_backbone()
        for parameter in worse.parameters():
            parameter.mul_(6.0)
    said = report.notes(compare(student, worse, {"x": rows_of(5, 1)}, Measures(paths=0, bits=Bits.ROUTER)))
    assert any("retention above 1 on x" in note for note in said)
    assert any("need two documents" in note for note in said) and any("router's bits" in note for note in said)


def test_the_table_has_a_line_for_each_set_and_the_json_is_plain(found: Comparison) -> None:
    shown = report.table(found)
    assert [line.split()[0] for line in shown.splitlines()[-4:]] == ["data", "one", "two", "all"]
    assert len({len(line) for line in shown.splitlines()[-4:]}) == 1
    assert f"retention {found.total.retention:.4f} [" in shown
    plain = found.total.as_dict()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain


def test_sets_are_drawn(found: Comparison, tmp_path_factory: pytest.TempPathFactory) -> None:
    target = tmp_path_factory.mktemp("plots") / "deeper" / "sets.png"
    plot_sets(found, target)
    assert target.read_bytes()[:4] == b"\x89PNG"
