"""Held-out text with what the router makes of it, for a picture or a report: a sentence, or a page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from megabyte_distill.data.packing import PackedRow
from megabyte_distill.data.progress import UNCOUNTED, Counter
from megabyte_distill.inference.bit_paths import device_of
from megabyte_distill.model.router import decide
from megabyte_distill.model.student import Parts, Student


@dataclass(frozen=True, slots=True, kw_only=True)
class MarkedText:
    """A piece of text and what router and tokenizer think of it; one entry a byte."""

    text: bytes
    p: Sequence[float]
    """Probability that the byte ends a chunk."""
    learned: Sequence[bool]
    gold: Sequence[bool]


@torch.no_grad()
def mark_sentence(
    student: Student, row: PackedRow, *, at_least: int = 100, at_most: int = 192, threshold: float = 0.5
) -> MarkedText:
    """A sentence or two out of the middle of a row's longest segment, read in its context.

    ValueError where the row has no text.
    """
    row, p, learned = _read(student, row, threshold)
    real = _segments(row)
    first, last = max(real, key=lambda pair: pair[1] - pair[0])
    text = bytes(row.byte_ids[first + 1 : last].tolist())
    if not text:
        raise ValueError("the row holds no text to show; give one with a document that is not empty")
    start, stop = sentence(text, at_least, at_most)
    start, stop = first + 1 + start, first + 1 + stop
    return _marked(row, p, learned, start, stop)


@torch.no_grad()
def mark_page(
    student: Student, rows: Iterable[PackedRow], *, at_most: int, threshold: float = 0.5, done: Counter = UNCOUNTED
) -> tuple[MarkedText, ...]:
    """The first ``at_most`` bytes of the rows' text, an entry a segment (a document or a part of one).

    No more rows are read than that takes. Empty where they hold no text. ``done`` counts bytes, :func:`page_bytes` in
    all.
    """
    page: list[MarkedText] = []
    room = at_most
    for given in rows:
        if room <= 0:
            break
        row, p, learned = _read(student, given, threshold)
        for first, last in _segments(row):
            text = bytes(row.byte_ids[first + 1 : last].tolist())
            size = len(text) if len(text) <= room else _character_start(text, room)
            if size:
                page.append(_marked(row, p, learned, first + 1, first + 1 + size))
            done.advance(min(len(text), room))
            room -= len(text)
            if room <= 0:
                break
    return tuple(page)


def page_bytes(rows: Iterable[PackedRow], at_most: int) -> int:
    """How many bytes of the rows' text a page of ``at_most`` takes."""
    return min(at_most, sum(last - first - 1 for row in rows for first, last in _segments(row)))


def _read(student: Student, row: PackedRow, threshold: float) -> tuple[PackedRow, Tensor, Tensor]:
    """(the row where the student is, p [P], the router's bits [P])."""
    row = row.to(device_of(student))
    outputs = student(row, parts=Parts.ENCODER | Parts.ROUTER)
    assert outputs.p is not None
    return row, outputs.p, decide(outputs.p, row.byte_ids, threshold, official=student.is_official)


def _segments(row: PackedRow) -> list[tuple[int, int]]:
    """(BOS, one past the last byte) of each segment that is no padding."""
    return [pair for pair in pairwise(row.cu_seqlens.tolist()) if bool(row.is_real[pair[0]])]


def _marked(row: PackedRow, p: Tensor, learned: Tensor, start: int, stop: int) -> MarkedText:
    return MarkedText(
        text=bytes(row.byte_ids[start:stop].tolist()),
        p=p[start:stop].tolist(),
        learned=learned[start:stop].tolist(),
        gold=row.bits[start:stop].tolist(),
    )


def sentence(text: bytes, at_least: int, at_most: int) -> tuple[int, int]:
    """Where a piece of ``at_least`` to ``at_most`` bytes lies that begins behind one full stop and ends with another.

    Less than that where the text is shorter or has no full stops. Never cuts a character.
    """
    begin = text.find(b". ", max(0, len(text) // 2 - at_least)) + 2
    if begin < 2 or len(text) - begin < at_least:
        begin = max(0, len(text) // 2 - at_least)
    end = text.find(b".", begin + at_least, begin + at_most) + 1
    if not end:
        end = min(len(text), begin + at_most)
    return _character_start(text, begin), _character_start(text, end)


def _character_start(text: bytes, position: int) -> int:
    while 0 < position < len(text) and text[position] & 0xC0 == 0x80:
        position -= 1
    return position


def split_characters(text: bytes) -> list[tuple[int, int, str | None]]:
    """(first byte, one past the last, the character) one by one; None for a byte that is in none."""
    result: list[tuple[int, int, str | None]] = []
    position = 0
    while position < len(text):
        character: str | None = None
        for size in (1, 2, 3, 4):
            try:
                character = text[position : position + size].decode("utf-8")
            except UnicodeDecodeError:
                continue
            break
        else:
            size = 1
        result.append((position, position + size, character))
        position += size
    return result
