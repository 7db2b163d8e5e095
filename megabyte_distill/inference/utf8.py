"""UTF-8 byte by byte: which bytes may come next, and which bytes of a text belong to no character."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import Enum
from functools import cache

import torch
from torch import Tensor

from megabyte_distill.alphabet import BOS_BYTE, BYTE_VOCAB

LONGEST_OPEN = 3
"""Bytes of a character that is not complete."""
_START, _ONE, _TWO, _THREE, _AFTER_E0, _AFTER_ED, _AFTER_F0, _AFTER_F4 = range(8)
"""Where a reader stands: at a character's start, before the last one, two or three bytes of one, or behind a first byte
that limits the second (overlong forms, surrogates, code points above U+10FFFF)."""
_NEXT: tuple[dict[int, Sequence[int]], ...] = (
    {
        _START: range(0x80),
        _ONE: range(0xC2, 0xE0),
        _TWO: (*range(0xE1, 0xED), *range(0xEE, 0xF0)),
        _THREE: range(0xF1, 0xF4),
        _AFTER_E0: (0xE0,),
        _AFTER_ED: (0xED,),
        _AFTER_F0: (0xF0,),
        _AFTER_F4: (0xF4,),
    },
    {_START: range(0x80, 0xC0)},
    {_ONE: range(0x80, 0xC0)},
    {_TWO: range(0x80, 0xC0)},
    {_ONE: range(0xA0, 0xC0)},
    {_ONE: range(0x80, 0xA0)},
    {_TWO: range(0x90, 0xC0)},
    {_TWO: range(0x80, 0x90)},
)
"""State → next state → the bytes that lead there."""


class Utf8Mode(str, Enum):
    """What becomes of bytes that are no UTF-8."""

    RAW = "raw"
    """The model may generate them."""
    CONSTRAIN = "constrain"
    """At each step the bytes that no UTF-8 text can go on with are impossible, and so is its end inside a character."""


def _transitions() -> list[list[int]]:
    table = [[-1] * BYTE_VOCAB for _ in _NEXT]
    for state, following in enumerate(_NEXT):
        for successor, byte_ids in following.items():
            for byte in byte_ids:
                table[state][byte] = successor
    table[_START][BOS_BYTE] = _START
    return table


_TABLE = _transitions()
"""[8][256] next state, −1 where the byte cannot follow. BOS ends a document between characters."""


def state_after(text: bytes) -> int:
    """Where a reader of ``text`` stands. A byte that cannot follow begins anew: what it breaks off is forgotten."""
    state = _START
    for byte in text[-LONGEST_OPEN:]:  # a character's first byte decides, whatever came before
        state = _follow(state, byte)
    return state


def _follow(state: int, byte: int) -> int:
    following = _TABLE[state][byte]
    return following if following >= 0 else max(_TABLE[_START][byte], _START)


def count_invalid(text: bytes, *, begun: bytes = b"", ended: bool = True) -> int:
    """How many bytes of ``text`` are part of no character.

    Args:
        text: raw bytes.
        begun: what came before; a character that it leaves open may be finished by the text.
        ended: False where the text was only cut off, so that a character left open at its end is not held against it.
    """
    state, pending, invalid = state_after(begun), 0, 0
    for byte in text:
        if _TABLE[state][byte] < 0:  # the character before breaks off here
            invalid += pending + int(_TABLE[_START][byte] < 0)
            pending = 0
        state = _follow(state, byte)
        pending = 0 if state == _START else pending + 1
    return invalid + pending if ended else invalid


def allowed_after(tails: Tensor) -> Tensor:
    """[N, 256] bool: bytes that may go on texts that end in tails [N, 3] int64, and BOS between characters.

    A shorter text is filled up in front with any byte below 128. Equal to :class:`Utf8Rows` where that allowed all.
    """
    table, follow = _tables(tails.device)
    states = torch.zeros_like(tails[:, 0])
    for column in tails.unbind(1):
        states = follow[states, column]
    return table[states] >= 0


@cache
def _tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """[8, 256] int64 each: the next state or −1, and where a byte that cannot follow begins anew."""
    table = torch.tensor(_TABLE, dtype=torch.int64, device=device)
    return table, torch.where(table >= 0, table, table[_START].clamp(min=_START))


class Utf8Rows:
    """R texts read byte by byte under :attr:`Utf8Mode.CONSTRAIN`."""

    def __init__(self, texts: Iterable[bytes], device: torch.device) -> None:
        """``texts``: what each row has read so far, of any bytes."""
        self._states = torch.tensor([state_after(text) for text in texts], dtype=torch.int64, device=device)
        self._table, _ = _tables(device)

    def allowed(self) -> Tensor:
        """[R, 256] bool: bytes that may come next, BOS among them only between characters. Some byte always may."""
        return self._table[self._states] >= 0

    def read(self, byte_ids: Tensor) -> None:
        """One allowed byte [R] int64 in each row."""
        self._states = self._table[self._states, byte_ids]

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows [N] int64 only, in this order."""
        self._states = self._states[rows]
