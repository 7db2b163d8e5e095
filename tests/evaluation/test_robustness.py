"""The suite on a tiny run: teacher and student read alike, and what a cut prompt costs is told right."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megabyte_distill.data import tokenizers
from megabyte_distill.data.dataset import ByteTokenDataset
from megabyte_distill.evaluation.bootstrap import Bootstrap
from megabyte_distill.evaluation.comparison_plots import plot_robustness
from megabyte_distill.evaluation.readers import StudentReader, TeacherReader
from megabyte_distill.evaluation.robustness import (
    CUTS,
    Budget,
    Entry,
    cut_piece,
    cut_spans,
    make_line,
    run_suite,
    suite_table,
    where_cut,
)
from megabyte_distill.inference.scoring import score_tokens
from tests.pretrain.job import write_data, write_tokenizer
from tests.tiny_student import tiny_backbone, tiny_student

pytestmark = pytest.mark.usefixtures("world")
BUDGET = Budget(texts=2, context_bytes=24, continuation_bytes=12, questions=2, shots=1, samples=1, sample_bytes=6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("hf") / "hf")


@pytest.fixture(scope="module")
def teacher(world: object, folder: Path) -> TeacherReader:
    torch.manual_seed(5)
    tokenizer = tokenizers.load(folder)
    return TeacherReader(tiny_backbone(vocab_size=300), tokenizer, tokenizer.token_bytes.padded(300), batch=2)


@pytest.fixture(scope="module")
def student(world: object) -> StudentReader:
    torch.manual_seed(6)
    return StudentReader(tiny_student().eval(), paths=2)


@pytest.fixture(scope="module")
def dataset(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> ByteTokenDataset:
    return ByteTokenDataset(write_data(tmp_path_factory.mktemp("data") / "held", folder, seed=1, documents=3))


def test_the_teacher_scores_its_tokens(teacher: TeacherReader, dataset: ByteTokenDataset) -> None:
    """Equal to the definition on a row of the same document."""
    from megabyte_distill.evaluation.held_out import held_out_rows

    [row] = held_out_rows([dataset.subset(range(1))], row_bytes=2048)
    text = bytes(dataset.byte_ids(0, 0, None))
    expected = float(score_tokens(teacher._backbone, row).bits[0])
    [pair] = teacher.pair_bits([(b"", text)])
    assert pair is not None and pair.prompt == 0.0
    assert pair.continuation == pytest.approx(expected, rel=1e-5)
    ends = teacher.token_ends(text)
    assert ends is not None and ends[-1] == len(text)
    cut = ends[len(ends) // 2]
    assert teacher.pair_bits([(text[:cut], text[cut:])])[0] is not None


def test_half_characters_are_spelled_by_bytes(teacher: TeacherReader) -> None:
    cat = "猫".encode()
    half, rest = teacher.tokens(b"a" + cat[:2]), teacher.tokens(cat[2:])
    assert half is not None and rest is not None and len(half) == 3 and len(rest) == 1
    assert teacher._spelled([*half, *rest]) == b"a" + cat
    assert teacher.tokens(b"\xff") is not None


def test_the_teacher_generates_what_full_forwards_say(teacher: TeacherReader) -> None:
    """Greedy by the cache, ragged, against the argmax of whole rows."""
    backbone, table = teacher._backbone, teacher._table
    prompts = [b"The old", b"a", b""]
    for prompt, said in zip(prompts, teacher.complete(prompts, max_bytes=9), strict=True):
        tokens, expected = [table.start_id, *(teacher.tokens(prompt) or [])], b""
        while len(expected) < 9:
            hidden = backbone(backbone.embed(torch.tensor(tokens)), torch.tensor([0, len(tokens)], dtype=torch.int32))
            logits = backbone.logits(hidden)[-1].masked_fill(torch.from_numpy(table.special), -torch.inf)
            if float(backbone.logits(hidden)[-1, table.end_of_text_id]) > float(logits.max()):
                break
            tokens.append(int(logits.argmax()))
            expected += table[tokens[-1]]
        assert said == expected[:9]


@pytest.mark.parametrize("reader", ["teacher", "student"])
def test_samples_depend_on_the_seed_alone(reader: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(reader)
    prompts = [b"The", b"The", b"x"]
    first = model.complete(prompts, max_bytes=8, temperature=1.0, seed=3)
    assert first == model.complete(prompts, max_bytes=8, temperature=1.0, seed=3)
    assert first != model.complete(prompts, max_bytes=8, temperature=1.0, seed=9)
    assert all(len(text) <= 8 for text in first)


def test_a_foreign_tokenizer_is_refused(teacher: TeacherReader, tmp_path: Path) -> None:
    foreign = tokenizers.load(write_tokenizer(tmp_path / "other", ["quite", "other", "words"], 280))
    with pytest.raises(ValueError, match="expected the tokenizer"):
        TeacherReader(tiny_backbone(vocab_size=300), foreign, teacher._table)


def test_spans_of_both_readers_are_pieces_of_their_texts(teacher: TeacherReader, student: StudentReader) -> None:
    text = "The old house né 猫 stood".encode()
    spans = [(start, len(text)) for start in range(len(text))]
    for reader in (teacher, student):
        pairs = reader.pair_bits([(text[:start], text[start:]) for start, _ in spans])
        wanted = [None if pair is None else pair.continuation for pair in pairs]
        assert reader.span_bits(text, spans) == pytest.approx(wanted, abs=1e-3)
    [whole] = student.pair_bits([(b"", text)])
    before = student.span_bits(text, [(0, start) for start, _ in spans])
    assert np.add(before, student.span_bits(text, spans)) == pytest.approx(whole.continuation, abs=1e-3)


def test_cuts_fall_where_they_fall() -> None:
    text, ends = "the hé o".encode(), [3, 7, 9]  # the | hé| o
    assert [where_cut(text, ends, start) for start in range(9)] == [
        CUTS[0], CUTS[1], CUTS[2], CUTS[0], CUTS[1], CUTS[2], CUTS[4], CUTS[0], CUTS[1],
    ]  # fmt: skip
    assert cut_spans(ends, 2, 4) == [(2, 3), (3, 7), (4, 7)]
    assert cut_spans(ends, 8, 4) == [(8, 9)]


def test_pieces_are_cut_in_front_of_white_space() -> None:
    text = " ".join(["word"] * 100)
    piece = cut_piece(text, 40, 20)
    assert piece is not None and (piece.context + piece.continuation) in text
    assert piece.continuation.startswith(" word") and not piece.context.endswith(" ")
    assert 35 < len(piece.context) < 65 and 10 < len(piece.continuation) < 30
    no_blanks = cut_piece("猫" * 90, 40, 20)
    assert no_blanks is not None and len(no_blanks.context) == 40 and len(no_blanks.continuation) == 20
    assert cut_piece("x", 40, 20) is None


def test_lines_are_sums_over_sums_of_what_both_have() -> None:
    entries = [Entry(4.0, 8.0, 2.0), Entry(None, 100.0, 1.0), Entry(8.0, 4.0, 6.0)]
    line = make_line("x", entries, Bootstrap(resamples=100))
    assert (line.teacher, line.student, line.count) == (1.5, 1.5, 2)
    assert line.teacher_interval == pytest.approx((4 / 3, 2.0)) and line.student_interval == pytest.approx((4 / 6, 4.0))
    alone = make_line("x", [Entry(None, 6.0, 3.0)], Bootstrap())
    assert (alone.teacher, alone.student, alone.teacher_interval) == (None, 2.0, None)


def test_the_suite_tells_everything_of_both(
    teacher: TeacherReader, student: StudentReader, dataset: ByteTokenDataset, tmp_path: Path
) -> None:
    sections = run_suite(teacher, student, [dataset], BUDGET, bootstrap=Bootstrap(resamples=20, seed=4))
    plain = [asdict(section) for section in sections]
    assert json.loads(json.dumps(plain, allow_nan=False))
    by_name = {section.name: section for section in sections}
    assert len(by_name["noise: continuation"].lines) == len(by_name["noise: text"].lines) == 26
    assert len(by_name["characters: ranking"].lines) == 4 and len(by_name["UTF-8: samples"].lines) == 10
    assert {line.label for line in by_name["prompts cut at every byte"].lines} <= set(CUTS)
    for section in sections:
        for line in section.lines:
            assert line.student is not None and line.teacher is not None and math.isfinite(line.student + line.teacher)
    clean, *_, noisy = by_name["noise: text"].lines
    assert noisy.student != clean.student and noisy.teacher != clean.teacher
    shown = suite_table(sections)
    assert "prompts cut at every byte" in shown and "Devanagari" in shown
    plot_robustness(sections, tmp_path / "robustness.png")
    assert (tmp_path / "robustness.png").read_bytes()[:4] == b"\x89PNG"


def test_clean_text_is_what_the_reader_says_of_it(
    teacher: TeacherReader, student: StudentReader, dataset: ByteTokenDataset
) -> None:
    from megabyte_distill.evaluation.robustness import noise_sections, take_pieces

    pieces = take_pieces([dataset], BUDGET)
    assert len(pieces) == 2
    behind, _ = noise_sections(teacher, student, pieces, Bootstrap(resamples=0))
    for name, reader in (("teacher", teacher), ("student", student)):
        pairs = reader.pair_bits([(piece.context.encode(), piece.continuation.encode()) for piece in pieces])
        size = sum(len(piece.continuation.encode()) for piece in pieces)
        expected = np.sum([pair.continuation for pair in pairs if pair is not None]) / size
        assert getattr(behind.lines[0], name) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("field, value", [("texts", 0), ("questions", -1), ("shots", -1), ("samples", 0)])
def test_budgets_of_nothing_are_refused(field: str, value: int) -> None:
    with pytest.raises(ValueError, match=field):
        Budget(**{field: value})


@given(st.text(max_size=40), st.integers(1, 30), st.integers(1, 30))
def test_a_piece_is_a_part_of_its_text(text: str, context: int, continuation: int) -> None:
    piece = cut_piece(text, context, continuation)
    if piece is not None:
        assert piece.context and piece.continuation and piece.context + piece.continuation in text
