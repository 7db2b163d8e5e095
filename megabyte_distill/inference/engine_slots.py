"""The rows that an engine runs side by side: what it asks of them, and how torch answers on any device."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from megabyte_distill.model.student import Student, StudentSpan, StudentState


class Slots(Protocol):
    """R places for rows, each of which has read some bytes. Indices ``rows`` [K] int64 are distinct and rise."""

    def reset(self, rows: Tensor) -> None:
        """These rows begin a document: BOS comes next."""

    def step(self, byte_ids: Tensor, rows: Tensor) -> Tensor:
        """Joint logits [K, 512] behind one more byte [K] of each row, none of which ends a chunk.

        A byte that should end one may be read so as well: what follows is then drafted from the chunk before.
        """

    def save(self, rows: Tensor) -> None:
        """Remember where these rows stand."""

    def read(self, byte_ids: Tensor, bits: Tensor, rows: Tensor, *, saved: bool) -> Tensor:
        """Joint logits [K, T, 512] behind each of the next T bytes [K, T] under their bits [K, T] bool.

        ``saved`` takes the rows back to where :meth:`save` saw them first. A row with fewer bytes is filled up with
        any, bits False. :meth:`keep` must follow.
        """

    def keep(self, counts: Tensor) -> None:
        """Of what :meth:`read` read, each row goes on behind the first ``counts`` [K] int64, 1 to T."""


class TorchSlots:
    """:class:`Slots` of a student as it is."""

    def __init__(self, student: Student, count: int) -> None:
        self._student = student
        self._state = student.init_state(count)
        self._saved: StudentState | None = None
        self._span: StudentSpan | None = None
        self._every = torch.arange(count, device=self._state.r_previous.device)

    def reset(self, rows: Tensor) -> None:
        """As :class:`Slots` says; likewise below."""
        self._state.put(rows, self._student.init_state(rows.shape[0]))

    def step(self, byte_ids: Tensor, rows: Tensor) -> Tensor:
        return self._student.step(byte_ids, torch.zeros_like(byte_ids, dtype=torch.bool), self._state, self._some(rows))

    def save(self, rows: Tensor) -> None:
        if self._saved is None:
            self._saved = self._state.without_cache(self._every)
        else:
            self._saved.put_beside_cache(rows, self._state.without_cache(rows))

    def read(self, byte_ids: Tensor, bits: Tensor, rows: Tensor, *, saved: bool) -> Tensor:
        if saved:
            assert self._saved is not None
            self._state.put_beside_cache(rows, self._saved.without_cache(rows))
        if byte_ids.shape[1] == 1:  # it will be kept
            return self._student.step(byte_ids[:, 0], bits[:, 0], self._state, self._some(rows))[:, None]
        logits, self._span = self._student.steps(byte_ids, bits, self._state, rows)
        return logits

    def keep(self, counts: Tensor) -> None:
        if self._span is not None:
            self._span.keep(counts)
            self._span = None

    def _some(self, rows: Tensor) -> Tensor | None:
        """None for all rows, which need no copies."""
        return None if rows.shape[0] == self._every.shape[0] else rows
