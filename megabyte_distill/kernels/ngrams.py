"""Hashed n-grams: which row of each n-gram's table a byte reads, from the bytes of its document up to it.

The n-gram of a byte is the byte and the n − 1 in front of it; what would lie before the document counts as a symbol of
its own. Hashes are polynomials modulo 2^64 whose high bits choose the row, so that a collision of two n-grams in one
table says nothing about the others.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

_BASE = 1_000_003
_MIX = 0x9E3779B97F4A7C15 - 2**64
"""2^64 over the golden ratio, as int64."""
_BEFORE = -1
"""Stands for a byte before the document."""


def ngram_indices(byte_ids: Tensor, position: Tensor, sizes: Sequence[int], rows: int) -> Tensor:
    """[P, T] int64 rows of one table that holds T = len(sizes) tables of ``rows`` rows one behind the other.

    byte_ids [P] int64; position [P] int64, a byte's place in its document.
    """
    recent = [byte_ids]
    for distance in range(1, max(sizes)):
        earlier = F.pad(byte_ids[:-distance], (min(distance, byte_ids.shape[0]), 0))
        recent.append(earlier.masked_fill(position < distance, _BEFORE))
    return _hashed(recent, sizes, rows)


def no_recent_bytes(rows: int, sizes: Sequence[int], device: torch.device) -> Tensor:
    """What R documents have read before their first byte: [R, max(sizes) − 1] int64."""
    return torch.full((rows, max(sizes, default=1) - 1), _BEFORE, dtype=torch.int64, device=device)


def step_indices(byte_ids: Tensor, recent: Tensor, sizes: Sequence[int], rows: int) -> tuple[Tensor, Tensor]:
    """:func:`ngram_indices` of the next byte [R] of documents whose last bytes are ``recent``, and the next recent."""
    window = torch.cat((recent, byte_ids[:, None]), dim=1)
    return _hashed(list(window.flip(1).unbind(1)), sizes, rows), window[:, 1:]


def window_indices(recent: Tensor, count: int, sizes: Sequence[int], rows: int) -> Tensor:
    """:func:`ngram_indices` [R, T, tables] of the last T = ``count`` bytes of recent [R, max(sizes) − 1 + T]."""
    return _hashed(list(recent.unfold(1, max(sizes), 1)[:, -count:].flip(2).unbind(2)), sizes, rows)


def _hashed(recent: Sequence[Tensor], sizes: Sequence[int], rows: int) -> Tensor:
    """[.., T] from the byte itself, the one before it, and so on."""
    hashes, power, total = {}, 1, torch.zeros_like(recent[0])
    for distance, byte in enumerate(recent):
        total = total + (byte + 1) * _signed(power)
        power = power * _BASE % 2**64
        hashes[distance + 1] = total
    return torch.stack(
        [((hashes[n] * _MIX >> 33) & 0x7FFFFFFF) % rows + table * rows for table, n in enumerate(sizes)], dim=-1
    )


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value
