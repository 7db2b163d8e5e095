"""The rows that an engine runs side by side: what it asks of them, and how torch answers on any device."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from megabyte_distill.inference.state_guess import StateGuess, following
from megabyte_distill.model.student import Student, StudentSpan, StudentState


class Slots(Protocol):
    """R places for rows, each of which has read some bytes. Indices ``rows`` [K] int64 are distinct and rise.

    Attributes:
        at_once: bytes of a prompt, of all rows together, that one :meth:`read` should take.
    """

    at_once: int

    def reset(self, rows: Tensor) -> None:
        """These rows begin a document: BOS comes next."""

    def step(self, byte_ids: Tensor, bits: Tensor, rows: Tensor) -> Tensor:
        """Joint logits [K, 512] behind one more byte [K] of each row. Where bits [K] bool are True, what the backbone
        says of the chunk is guessed: what follows is a draft.
        """

    def save(self, rows: Tensor) -> None:
        """Remember where these rows stand; none of them has read a draft."""

    def read(self, byte_ids: Tensor, bits: Tensor, rows: Tensor, *, saved: bool) -> Tensor:
        """Joint logits [K, T, 512] behind each of the next T bytes [K, T] under their bits [K, T] bool.

        ``saved`` takes the rows back to where :meth:`save` saw them first. A row with fewer bytes is filled up with
        any, bits False. :meth:`keep` must follow.
        """

    def keep(self, counts: Tensor) -> None:
        """Of what :meth:`read` read, each row goes on behind the first ``counts`` [K] int64, 1 to T."""


class TorchSlots:
    """:class:`Slots` of a student as it is."""

    at_once = 512
    # Mamba-2 compares each byte of a block with each, and attention each new chunk with all that a row holds

    def __init__(self, student: Student, count: int, guess: StateGuess | None) -> None:
        """``guess``, which learns from what the backbone says; None where nothing is drafted."""
        self._student, self._guess = student, guess
        self._state = student.init_state(count)
        self._saved: StudentState | None = None
        self._span: StudentSpan | None = None
        self._every = torch.arange(count, device=self._state.r_previous.device)
        self._hidden = torch.zeros_like(self._state.r_previous)  # of each row's last chunk
        self._guessed = self._hidden.clone()  # of the last one drafted

    def reset(self, rows: Tensor) -> None:
        """As :class:`Slots` says; likewise below."""
        self._state.put(rows, self._student.init_state(rows.shape[0]))
        self._hidden[rows] = 0.0

    def step(self, byte_ids: Tensor, bits: Tensor, rows: Tensor) -> Tensor:
        return self._student.step(byte_ids, bits, self._state, self._some(rows), self._guess_states)

    def _guess_states(self, chunks: Tensor, rows: Tensor) -> Tensor:
        assert self._guess is not None
        self._guessed[rows] = self._guess(chunks, self._guessed[rows]).to(self._guessed.dtype)
        return self._guessed[rows]

    def save(self, rows: Tensor) -> None:
        self._guessed[rows] = self._hidden[rows]
        if self._saved is None:
            self._saved = self._state.without_cache(self._every)
        else:
            self._saved.put_beside_cache(rows, self._state.without_cache(rows))

    def read(self, byte_ids: Tensor, bits: Tensor, rows: Tensor, *, saved: bool) -> Tensor:
        if saved:
            assert self._saved is not None
            self._state.put_beside_cache(rows, self._saved.without_cache(rows))
        if byte_ids.shape[1] == 1 and self._guess is None:  # it will be kept, and nobody learns from it
            return self._student.step(byte_ids[:, 0], bits[:, 0], self._state, self._some(rows))[:, None]
        logits, self._span = self._student.steps(byte_ids, bits, self._state, rows)
        return logits

    def keep(self, counts: Tensor) -> None:
        span, self._span = self._span, None
        if span is None:
            return
        span.keep(counts)
        if self._guess is not None:
            is_kept = torch.arange(span.bits.shape[1], device=counts.device) < counts[:, None]
            row, place = (span.bits & is_kept).nonzero(as_tuple=True)
            hidden = span.h[row, place]
            self._guess.learn(span.chunks[row, place], following(row, hidden, self._hidden[span.rows]), hidden)
            remember_last(self._hidden, span.rows, row, hidden)

    def _some(self, rows: Tensor) -> Tensor | None:
        """None for all rows, which need no copies."""
        return None if rows.shape[0] == self._every.shape[0] else rows


def remember_last(store: Tensor, rows: Tensor, row: Tensor, hidden: Tensor) -> None:
    """store[rows[k]] becomes the last of ``hidden`` [N, E] whose ``row`` [N], which rises, is k; others stay."""
    if row.shape[0]:
        is_last = torch.cat((row[1:] != row[:-1], torch.ones_like(row[:1], dtype=torch.bool)))
        store[rows[row[is_last]]] = hidden[is_last]
