"""Pictures: readable input, whole output, and what they say about bytes and characters."""

from __future__ import annotations

from pathlib import Path

import pytest

from megabyte_distill.alphabet import BOS_BYTE
from megabyte_distill.evaluation.boundary_picture import characters, plot_boundaries
from megabyte_distill.evaluation.marked_text import MarkedText, mark_page, mark_sentence, sentence
from tests.tiny_student import padded_row, random_rows, tiny_student

PNG = b"\x89PNG"


@pytest.mark.filterwarnings("error")
def test_boundaries_are_drawn_for_any_bytes(tmp_path: Path) -> None:
    text = "It cost $5_x^2 at the café, 日本 🙂\n".encode() * 3 + b"\xff\x80"
    bits = [index % 4 == 0 for index in range(len(text))]
    marked = MarkedText(text=text, p=[0.3] * len(text), learned=bits, gold=bits[::-1])
    plot_boundaries(marked, tmp_path / "boundaries.png")
    assert (tmp_path / "boundaries.png").read_bytes()[:4] == PNG
    with pytest.raises(ValueError, match="at least one byte"):
        plot_boundaries(MarkedText(text=b"", p=[], learned=[], gold=[]), tmp_path / "no.png")


def test_characters_span_their_bytes() -> None:
    assert characters("aé 日".encode()) == [(0, 1, "a"), (1, 3, "é"), (3, 4, "␣"), (4, 7, "日")]
    assert characters(b"\xe6\x97a") == [(0, 1, "E6"), (1, 2, "97"), (2, 3, "a")]


def test_a_sentence_is_whole_where_there_are_full_stops() -> None:
    text = b"One. " + b"A sentence of some words stands here. " * 10
    start, stop = sentence(text, 50, 120)
    assert text[start - 2 : start] == b". " and text[stop - 1 : stop] == b"." and 50 <= stop - start <= 120


@pytest.mark.parametrize("text", [b"", b"abc", "é".encode() * 300, b"." * 40, b"no stops at all " * 30])
def test_a_sentence_is_found_in_any_text_and_cuts_no_character(text: bytes) -> None:
    start, stop = sentence(text, 20, 55)
    assert 0 <= start <= stop <= len(text) and stop - start <= 55
    text[start:stop].decode()


@pytest.mark.usefixtures("world")
def test_a_marked_sentence_has_the_rows_own_bits() -> None:
    row = padded_row()
    marked = mark_sentence(tiny_student().eval(), row)
    whole = bytes(row.byte_ids.tolist())
    first = whole.index(marked.text)
    assert list(marked.gold) == row.bits[first : first + len(marked.text)].tolist()
    assert [p > 0.5 for p in marked.p] == list(marked.learned)


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("at_most", [1, 40, 10_000])
def test_a_page_is_the_beginning_of_the_rows_text_segment_by_segment(at_most: int) -> None:
    rows = random_rows(3)
    page = mark_page(tiny_student().eval(), rows, at_most=at_most)
    whole = bytes(byte for row in rows for byte in row.byte_ids[row.is_real].tolist() if byte < BOS_BYTE)
    got = b"".join(marked.text for marked in page)
    assert whole.startswith(got) and min(at_most, len(whole)) - 3 <= len(got) <= at_most
    gold = [bit for row in rows for bit in row.bits[row.is_real & (row.byte_ids < BOS_BYTE)].tolist()]
    assert [bit for marked in page for bit in marked.gold] == gold[: len(got)]
    assert all([p > 0.5 for p in marked.p] == list(marked.learned) for marked in page)
