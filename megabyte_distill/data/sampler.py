"""Which bytes make which row: deterministic, resumable, independent of ranks and workers, without an index.

Planning reads token ids only. Every rank plans every row and materialises its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np

from megabyte_distill.data.alignment import check_rebuild
from megabyte_distill.data.dataset import DocumentSource
from megabyte_distill.data.packing import PackedRow, Segment, pack_row
from megabyte_distill.data.permutation import Permutation

MIN_SHARE = 1e-15
"""Smallest part of all rows that a data set may have; smaller ones are below the rounding of a credit."""
MIN_ROOM = 16
"""Bytes below which a row's rest is padded rather than given to another document."""


@dataclass(frozen=True, slots=True)
class SegmentPlan:
    """Tokens ``token_start`` … ``token_end`` of a document and the bytes they spell, BOS not counted."""

    document: int
    token_start: int
    token_end: int
    byte_start: int
    byte_end: int
    ends_document: bool


@dataclass(frozen=True, slots=True)
class RowPlan:
    """What a row holds; all segments are of one data set."""

    dataset: int
    """Position of the data set in the blend."""
    segments: tuple[SegmentPlan, ...]


@dataclass(slots=True)
class Position:
    """How far a data set is read."""

    epoch: int = 0
    cursor: int = 0
    """Index in the epoch's order."""
    token: int = 0
    """Tokens of that document already used."""
    byte: int = 0
    """Bytes of that document already used."""


class _Order(Protocol):
    def document(self, epoch: int, cursor: int) -> int | None:
        """Global index of a document, None where there is no such epoch."""
        ...


class _Shuffled:
    """Another keyed order in every epoch, without end."""

    def __init__(self, documents: range, key: tuple[int, ...]) -> None:
        self._documents, self._key = documents, key
        self._epoch, self._permutation = -1, Permutation(len(documents), key)

    def document(self, epoch: int, cursor: int) -> int | None:
        if epoch != self._epoch:
            self._epoch, self._permutation = epoch, Permutation(len(self._documents), (*self._key, epoch))
        return self._documents[self._permutation[cursor]]


class _Once:
    """Documents as stored, one epoch."""

    def __init__(self, documents: range) -> None:
        self._documents = documents

    def document(self, epoch: int, cursor: int) -> int | None:
        return self._documents[cursor] if epoch == 0 and cursor < len(self._documents) else None


def _take(source: DocumentSource, document: int, position: Position, room: int) -> SegmentPlan | None:
    """As many whole tokens as fit in ``room`` bytes behind a BOS; None where not even the next one does."""
    total = source.num_tokens(document)
    start = position.token
    if total < start:
        raise ValueError(
            f"{source.name}: document {document} has {total} tokens, the position is at token {start}: another data "
            "set than the position was saved with, or a damaged one"
        )
    lengths = source.table.lengths[source.tokens(document, start, min(total, start + room - 1))]
    if lengths.size and int(lengths.min()) == 0:
        token = start + int(np.argmin(lengths))
        raise ValueError(f"{source.name}: document {document}, token {token} is special and has no bytes: damaged")
    ends = np.cumsum(lengths, dtype=np.int64)
    count = int(np.searchsorted(ends, room - 1, side="right"))
    if count == 0 and total > start:
        return None
    size = int(ends[count - 1]) if count else 0
    return SegmentPlan(document, start, start + count, position.byte, position.byte + size, start + count == total)


def plan_row(
    source: DocumentSource, order: _Order, position: Position, *, row_bytes: int, min_room: int
) -> tuple[SegmentPlan, ...]:
    """Fills one row greedily and moves ``position`` behind it; empty where the order has ended.

    ValueError where one token is longer than a row.
    """
    segments: list[SegmentPlan] = []
    used = 0
    while not segments or row_bytes - used >= min_room:
        document = order.document(position.epoch, position.cursor)
        if document is None:
            break
        segment = _take(source, document, position, row_bytes - used)
        if segment is None:
            if not segments:
                raise ValueError(
                    f"{source.name}: document {document}, token {position.token} alone is longer than a row of "
                    f"{row_bytes} bytes holds beside BOS; use longer rows"
                )
            break
        segments.append(segment)
        used += 1 + segment.byte_end - segment.byte_start
        if not segment.ends_document:
            position.token, position.byte = segment.token_end, segment.byte_end
            break
        position.token = position.byte = 0
        position.cursor += 1
        if position.cursor == len(source.documents):
            position.epoch, position.cursor = position.epoch + 1, 0
    return tuple(segments)


def materialize(
    source: DocumentSource, plan: RowPlan, *, row_bytes: int, chunk_bucket: int, reads_loss_mask: bool = False
) -> PackedRow:
    """Reads the bytes and tokens of a plan; ValueError names a document whose tokens do not spell its bytes.

    ``reads_loss_mask``: what the source's mask marks comes with the row.
    """
    segments = []
    for part in plan.segments:
        look_ahead = 0 if part.ends_document else 1
        tokens = source.tokens(part.document, part.token_start, part.token_end + look_ahead)
        stop = None if part.ends_document else part.byte_end + 1
        byte_ids = source.byte_ids(part.document, part.byte_start, stop)
        own_tokens = tokens[: part.token_end - part.token_start]
        own_bytes = byte_ids if part.ends_document else byte_ids[:-1]
        check_rebuild(own_tokens, own_bytes, source.table, document=f"{part.document} of {source.name}")
        segments.append(
            Segment(
                document=part.document,
                byte_ids=own_bytes,
                tokens=own_tokens,
                token_lengths=source.table.lengths[own_tokens],
                next_byte=int(byte_ids[-1]) if look_ahead else None,
                next_token=int(tokens[-1]) if look_ahead else None,
                next_token_length=int(source.table.lengths[tokens[-1]]) if look_ahead else None,
                marked=source.marked(part.document, part.byte_start, part.byte_end + 1) if reads_loss_mask else None,
            )
        )
    table = source.table
    return pack_row(
        segments,
        row_bytes=row_bytes,
        chunk_bucket=chunk_bucket,
        start_id=table.start_id,
        end_of_text_id=table.end_of_text_id,
    )


class Turns:
    """Which data set gives the next row: the one furthest behind its share, the first of several equally far.

    A credit is what a data set is behind, in rows: every turn adds each set's share to its own, and takes one row from
    the chosen set's. Credits stay within a few rows of 0, so that a share of 1e-12 is still counted to four digits.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        """``weights`` need not sum to one. ValueError where one is not a positive number or too small to be counted."""
        if any(not math.isfinite(weight) or weight <= 0 for weight in weights):
            raise ValueError(f"blend weights {list(weights)}: expected positive numbers")
        # a power of two rounds nothing, and the sum of huge weights stays finite
        scaled = [math.ldexp(weight, -math.frexp(max(weights))[1]) for weight in weights]
        total = math.fsum(scaled)
        self.shares = np.array([weight / total for weight in scaled], dtype=np.float64)
        if float(self.shares.min()) < MIN_SHARE:
            raise ValueError(
                f"blend weight {weights[int(self.shares.argmin())]} is a share of {float(self.shares.min())} of all "
                f"rows, expected at least {MIN_SHARE}: that data set would never be read; leave it out"
            )
        self.credits = np.zeros(len(weights))

    def next(self) -> int:
        """Position of the data set whose turn it is."""
        self.credits += self.shares
        chosen = int(self.credits.argmax())
        self.credits[chosen] -= 1.0
        return chosen


class RowStream:
    """Endless training rows from a blend of data sets.

    A function of (seed, data sets, weights, row_bytes, min_room) alone. Each row is of one data set, the one that is
    furthest behind its share of rows. Data sets are read in a new shuffled order each epoch; a document that a row
    cuts goes on in its data set's next row.
    """

    def __init__(
        self,
        datasets: Sequence[DocumentSource],
        weights: Sequence[float] | None = None,
        *,
        row_bytes: int,
        chunk_bucket: int,
        seed: int,
        min_room: int = MIN_ROOM,
        reads_loss_mask: bool = False,
    ) -> None:
        """``weights`` need not sum to one; None means equal. ValueError for empty or mismatched data sets.

        ``reads_loss_mask``: rows come with what the data sets' masks mark.
        """
        weights = [1.0] * len(datasets) if weights is None else list(weights)
        _check_sources(datasets, weights, row_bytes=row_bytes, chunk_bucket=chunk_bucket)
        self.datasets = tuple(datasets)
        self._reads_loss_mask = reads_loss_mask
        self._turns = Turns(weights)
        self.row_bytes, self.chunk_bucket, self.seed, self.min_room = row_bytes, chunk_bucket, seed, min_room
        self.rows = 0
        """Rows planned so far."""
        self._orders = [_Shuffled(source.documents, (seed, index)) for index, source in enumerate(datasets)]
        self._positions = [Position() for _ in datasets]

    def next_rows(self, count: int) -> list[RowPlan]:
        """Plans of the next ``count`` rows, in order; equal on all ranks. Take yours and :meth:`materialize` them."""
        return [self._next_row() for _ in range(count)]

    def _next_row(self) -> RowPlan:
        chosen = self._turns.next()
        segments = plan_row(
            self.datasets[chosen],
            self._orders[chosen],
            self._positions[chosen],
            row_bytes=self.row_bytes,
            min_room=self.min_room,
        )
        self.rows += 1
        return RowPlan(chosen, segments)

    def materialize(self, plan: RowPlan) -> PackedRow:
        """The row of a plan; the only step that reads bytes."""
        source = self.datasets[plan.dataset]
        return materialize(
            source,
            plan,
            row_bytes=self.row_bytes,
            chunk_bucket=self.chunk_bucket,
            reads_loss_mask=self._reads_loss_mask,
        )

    def state_dict(self) -> dict[str, Any]:
        """The position, as plain numbers, texts, lists and dicts (JSON keeps it exactly)."""
        return {
            "seed": self.seed,
            "row_bytes": self.row_bytes,
            "min_room": self.min_room,
            "documents": [len(source.documents) for source in self.datasets],
            "data": [source.digest for source in self.datasets],
            "tokenizer_hash": self.datasets[0].table.hash,
            "rows": self.rows,
            "positions": [asdict(position) for position in self._positions],
            "credits": self._turns.credits.tolist(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where ``state`` was taken; ValueError names all that does not match.

        Weights may differ: each data set goes on behind its last row, and the rows to come have the new shares.
        """
        own = self.state_dict()
        names = ("seed", "row_bytes", "min_room", "documents", "data", "tokenizer_hash")
        wrong = [
            f"{name}: saved {state.get(name)!r}, now {own[name]!r}" for name in names if state.get(name) != own[name]
        ]
        if wrong:
            raise ValueError(
                "the data position was saved with other settings ("
                + "; ".join(wrong)
                + "); resume with the same ones, "
                "or start the stage anew"
            )
        self.rows = int(state["rows"])
        self._positions = [Position(**position) for position in state["positions"]]
        self._turns.credits = np.array(state["credits"], dtype=np.float64)


def evaluation_plans(source: DocumentSource, *, row_bytes: int, min_room: int = MIN_ROOM) -> Iterator[RowPlan]:
    """Plans of rows that go once through a data set in stored order, nothing left out; the last row may be short."""
    order, position = _Once(source.documents), Position()
    while segments := plan_row(source, order, position, row_bytes=row_bytes, min_room=min_room):
        yield RowPlan(0, segments)


def evaluation_rows(
    source: DocumentSource, *, row_bytes: int, chunk_bucket: int, min_room: int = MIN_ROOM
) -> Iterator[PackedRow]:
    """The rows of :func:`evaluation_plans`."""
    _check_sources([source], [1.0], row_bytes=row_bytes, chunk_bucket=chunk_bucket)
    for plan in evaluation_plans(source, row_bytes=row_bytes, min_room=min_room):
        yield materialize(source, plan, row_bytes=row_bytes, chunk_bucket=chunk_bucket)


def _check_sources(
    datasets: Sequence[DocumentSource], weights: Sequence[float], *, row_bytes: int, chunk_bucket: int
) -> None:
    if not datasets or len(datasets) != len(weights):
        raise ValueError(
            f"{len(datasets)} data sets and {len(weights)} weights; expected one weight each, at least one"
        )
    if row_bytes < 2 or chunk_bucket < 1:
        raise ValueError(f"row of {row_bytes} bytes, chunk bucket {chunk_bucket}: expected at least 2 and 1")
    for source in datasets:
        if not len(source.documents):
            raise ValueError(f"{source.name}: no documents (after the split); use more text or another --split")
        if source.table.hash != datasets[0].table.hash:
            raise ValueError(
                f"{source.name}: tokenizer {source.table.hash}, {datasets[0].name} has {datasets[0].table.hash}; a "
                "blend needs one tokenizer"
            )
