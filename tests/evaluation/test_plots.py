"""Pictures: readable input, whole output, and what they say about bytes and characters."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from megabyte_distill.evaluation.marked_text import MarkedText, mark_sentence, sentence
from megabyte_distill.evaluation.plots import characters, plot_boundaries, plot_losses, read_metrics
from tests.tiny_student import padded_row, tiny_student

PNG = b"\x89PNG"


def write(path: Path, *records: dict[str, object], tail: str = "") -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + tail)
    return path


def test_curves_are_read_by_stage_and_the_last_record_of_an_update_counts(tmp_path: Path) -> None:
    metrics = write(
        tmp_path / "metrics.jsonl",
        {"stage": "1a", "iteration": 1, "time": 0.0, "mse": 3.0, "learning rate": 1.0},
        {"stage": "1a", "iteration": 2, "time": 0.0, "mse": 2.0},
        {"stage": "1a", "iteration": 2, "time": 1.0, "mse": 1.5},
        {"stage": "1b", "iteration": 1, "time": 0.0, "validation kl": 0.5},
        tail='{"stage": "1b", "itera',
    )
    curves = read_metrics(metrics)
    assert list(curves) == ["1a", "1b"] and list(curves["1a"]) == ["mse"]
    assert curves["1a"]["mse"].xy() == ([1, 2], [3.0, 1.5])


def test_losses_are_drawn_with_gaps_and_negative_values(tmp_path: Path) -> None:
    metrics = write(
        tmp_path / "metrics.jsonl",
        {"stage": "1a", "iteration": 1, "alignment mse": 1.0, "alignment mse relative": math.nan},
        {"stage": "2b", "iteration": 1, "byte ce": -1.0, "joint bits per byte": 100.0, "boundary f1": 0.5},
        {"stage": "2b", "iteration": 2, "byte ce": 1.0, "joint bits per byte": 2.0, "validation boundary f1": 0.6},
    )
    target = tmp_path / "deeper" / "losses.png"
    plot_losses(metrics, target)
    assert target.read_bytes()[:4] == PNG


@pytest.mark.parametrize("content", [None, "", "nothing\n", '{"stage": "1a", "iteration": 1, "time": 0}\n'])
def test_metrics_without_figures_are_refused(tmp_path: Path, content: str | None) -> None:
    metrics = tmp_path / "metrics.jsonl"
    if content is not None:
        metrics.write_text(content)
    with pytest.raises(ValueError, match=r"metrics\.jsonl"):
        plot_losses(metrics, tmp_path / "losses.png")


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
