"""Larger chunks: which of the teacher's token ends stay ends when adjacent tokens are merged.

A token's end stays where its strength reaches a limit; the token joins the one behind it elsewhere. The strength is the
token's length in bytes: a function of the text so far, which says nothing of the bytes that follow (the targets of
objectives/merged_ce.py need that), and the same in every row, epoch and process. A chunk ends with its longest token,
whose state is what the backbone reads. Long runs of weak ends are cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from megabyte_distill.alphabet import BOS_BYTE, BYTE_VOCAB, END_OF_DOCUMENT_CLASS, PAD_BYTE, joint_class
from megabyte_distill.config.stage import StageConfig
from megabyte_distill.data.packing import PackedRow

LONGEST = 4
"""A chunk of this many times the limit in bytes ends with the token that reached it."""
STEPS = 32
"""Limits are multiples of 1 / STEPS."""
HIGHEST_LIMIT = 64
SAMPLE_ROWS, SAMPLE_ROW_BYTES = 256, 1 << 12
"""Text on which limits are tried: a megabyte, of each data set its share of the rows."""


# Lengths are whole numbers, and one more byte may take the mean from 6 to 8: among ends that are equally strong, a
# number by the token's last byte decides, which the byte's own state shows as well.
_LAST_BYTE = (np.arange(256, dtype=np.float32) * 97 % 256) / 512


class MergedEnds(NamedTuple):
    """Which token ends of a packed row stay."""

    bits: NDArray[np.bool_]
    """[P]."""
    forced: NDArray[np.bool_]
    """[P] those of them that stay only because their segment ends there."""


def merged_ends(byte_ids: NDArray[np.int64], bits: NDArray[np.bool_], limit: float) -> MergedEnds:
    """The ends that stay of token ends ``bits`` [P] in bytes [P] of a packed row, which begins with BOS.

    BOS, a segment's last byte and the first PAD byte stay ends. A limit of 1 merges nothing.
    """
    ends = np.flatnonzero(bits)
    own = byte_ids[ends]
    kept = (np.diff(ends, prepend=-1) + _LAST_BYTE[own] >= limit) | (own >= BOS_BYTE)
    _cut_long(ends, kept, LONGEST * limit)
    is_last = np.append(byte_ids[1:], PAD_BYTE)[ends] >= BOS_BYTE
    merged, forced = np.zeros_like(bits), np.zeros_like(bits)
    merged[ends[kept | is_last]] = True
    forced[ends[is_last & ~kept]] = True
    return MergedEnds(merged, forced)


def _cut_long(ends: NDArray[np.int64], kept: NDArray[np.bool_], longest: float) -> None:
    """Keeps, in place, every end at which the chunk since the last end that is kept has ``longest`` bytes."""
    places = np.append(np.flatnonzero(kept), len(ends))
    is_long = np.diff(np.append(ends, ends[-1] + 1)[places]) > longest
    for place, stop in zip(places[:-1][is_long].tolist(), places[1:][is_long].tolist(), strict=True):
        while (place := int(np.searchsorted(ends, ends[place] + longest))) < stop:
            kept[place] = True


def merge_row(row: PackedRow, limit: float | None) -> PackedRow:
    """The row with larger chunks: its bits and labels are those of the ends that stay, ``token_bits`` the teacher's.

    With limit None the row itself. The bit of a label behind a cut is judged without the byte that follows there.
    """
    if limit is None:
        return row
    byte_ids, gold, given = row.byte_ids.cpu(), row.token_ends, row.labels.cpu()
    found = merged_ends(byte_ids.numpy(), gold.cpu().numpy(), limit)
    merged, forced = torch.from_numpy(found.bits), torch.from_numpy(found.forced)
    following = F.pad(byte_ids[1:], (0, 1), value=PAD_BYTE)
    is_inside = following < BOS_BYTE
    inside = joint_class(following, F.pad(merged[1:], (0, 1)).to(torch.int64))
    # behind a cut: a token of one byte, if it ends there
    byte = given % BYTE_VOCAB
    is_weak = 1 + torch.from_numpy(_LAST_BYTE)[byte] < limit
    behind = torch.where(is_weak & (given != END_OF_DOCUMENT_CLASS), byte, given)
    labels = torch.where(is_inside, inside, behind)
    device = row.bits.device
    return replace(
        row, bits=merged.to(device), labels=labels.to(device), token_bits=gold, forced_ends=forced.to(device)
    )


def bytes_and_chunks(row: PackedRow, bits: Tensor) -> tuple[Tensor, Tensor]:
    """(bytes of a row's text, chunks that ``bits`` [P] bool cut them into), BOS and PAD left out."""
    is_text = row.is_real & (row.byte_ids != BOS_BYTE)
    return is_text.sum().double(), (bits & is_text).sum()


class ChunkSizes:
    """Which limit gives chunks of how many bytes, found by trying on a sample of the text."""

    def __init__(self, rows: Sequence[PackedRow]) -> None:
        """ValueError where the rows hold no text."""
        self._rows = [(row.byte_ids.cpu().numpy(), row.token_ends.cpu().numpy()) for row in rows]
        self._bytes = sum(int((byte_ids < BOS_BYTE).sum()) for byte_ids, _ in self._rows)
        if not self._bytes:
            raise ValueError("--target-bytes-per-chunk: the sample of training rows holds no text to measure chunks on")
        self._means: dict[int, float] = {}

    def mean(self, limit: float) -> float:
        """Bytes of a chunk under a limit, a multiple of 1 / STEPS; that of the teacher's tokens under 1."""
        step = round(limit * STEPS)
        if step not in self._means:
            merged = ((byte_ids, merged_ends(byte_ids, bits, step / STEPS).bits) for byte_ids, bits in self._rows)
            chunks = sum(int(np.count_nonzero(bits & (byte_ids < BOS_BYTE))) for byte_ids, bits in merged)
            self._means[step] = self._bytes / chunks
        return self._means[step]

    def limit_for(self, target: float) -> float | None:
        """The limit whose chunks are nearest to ``target`` bytes; None where the teacher's tokens are that long."""
        if target <= self.mean(1.0):
            return None
        low, high = STEPS, HIGHEST_LIMIT * STEPS
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.mean(middle / STEPS) >= target else (middle, high)
        best = min((low, high), key=lambda step: abs(self.mean(step / STEPS) - target))
        return None if best == STEPS else best / STEPS


class ChunkLimits(Protocol):
    """What rows are merged with at each update of a stage."""

    def limit(self, iteration: int) -> float | None:
        """What rows of the update behind ``iteration`` others are merged with; None where they stay as they are."""


@dataclass(frozen=True, slots=True)
class SameLimit:
    """Chunks as long as an earlier stage left them."""

    value: float

    def limit(self, iteration: int) -> float:
        """The same at every update."""
        return self.value


@dataclass(frozen=True, slots=True)
class ChunkSchedule:
    """A stage's limit at each of its updates; the same on every rank."""

    config: StageConfig
    sizes: ChunkSizes

    def target(self, iteration: int) -> float:
        """Bytes a chunk that the update behind ``iteration`` others aims at."""
        config = self.config
        assert config.target_bytes_per_chunk is not None
        start = config.target_bytes_per_chunk_start
        first = self.sizes.mean(1.0) if start is None else start
        ramp = config.target_bytes_per_chunk_iters
        done = min(1.0, iteration / (ramp - 1)) if ramp > 1 else 1.0
        return first + (config.target_bytes_per_chunk - first) * done

    def limit(self, iteration: int) -> float | None:
        """What rows of that update are merged with; None where they stay as they are."""
        return self.sizes.limit_for(self.target(iteration))


class SampledStream(Protocol):
    """What of a row stream a sample needs."""

    def next_rows(self, count: int) -> list[Any]: ...

    def materialize(self, plan: Any) -> PackedRow: ...


def sample_rows(stream: SampledStream) -> list[PackedRow]:
    """The next SAMPLE_ROWS rows of a stream."""
    return [stream.materialize(plan) for plan in stream.next_rows(SAMPLE_ROWS)]
