"""A sentence of held-out text with what the router makes of it, for a picture or a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from megabyte_distill.data.packing import PackedRow
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
    row = row.to(device_of(student))
    outputs = student(row, parts=Parts.ENCODER | Parts.ROUTER)
    assert outputs.p is not None
    learned = decide(outputs.p, row.byte_ids, threshold, official=student.is_official)
    edges = row.cu_seqlens.tolist()
    real = [pair for pair in pairwise(edges) if bool(row.loss_mask[pair[0]])]
    first, last = max(real, key=lambda pair: pair[1] - pair[0])
    text = bytes(row.byte_ids[first + 1 : last].tolist())
    if not text:
        raise ValueError("the row holds no text to show; give one with a document that is not empty")
    start, stop = sentence(text, at_least, at_most)
    start, stop = first + 1 + start, first + 1 + stop
    return MarkedText(
        text=bytes(row.byte_ids[start:stop].tolist()),
        p=outputs.p[start:stop].tolist(),
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
