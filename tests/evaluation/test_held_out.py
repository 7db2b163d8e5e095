"""Which text a run is judged on."""

from __future__ import annotations

import pytest
import torch

from megabyte_distill.data.mock import MockDataset
from megabyte_distill.data.packing import PackedRow
from megabyte_distill.evaluation.held_out import held_out_rows, opening, openings
from megabyte_distill.inference.scoring import segment_texts


class Sliced(MockDataset):
    """Mock documents of which some can be taken."""

    def subset(self, documents: range) -> Sliced:
        part = Sliced(60, seed=self._seed, max_tokens=self._max_tokens)
        part.documents = documents
        return part


@pytest.fixture
def source() -> Sliced:
    return Sliced(60, seed=1, num_documents=12, max_tokens=80)


def text_of(rows: list[PackedRow]) -> bytes:
    return b"".join(bytes(text.tolist()) for row in rows for text in segment_texts(row))


def test_nothing_is_left_out_or_read_twice(source: Sliced) -> None:
    rows = held_out_rows([source, source], row_bytes=64)  # type: ignore[list-item]
    whole = b"".join(bytes(source.byte_ids(document, 0, None)) for document in source.documents)
    assert text_of(rows) == whole * 2


def test_limits_cut_whole_rows_and_whole_documents(source: Sliced) -> None:
    rows = held_out_rows([source], row_bytes=64, max_bytes=200)  # type: ignore[list-item]
    sizes = [sum(text.shape[0] for text in segment_texts(row)) for row in rows]
    assert sum(sizes) >= 200 > sum(sizes[:-1])
    rows = held_out_rows([source, source], row_bytes=64, max_documents=2)  # type: ignore[list-item]
    assert text_of(rows) == b"".join(bytes(source.byte_ids(document, 0, None)) for document in (0, 1)) * 2


@pytest.mark.parametrize("limit", ["max_bytes", "max_documents"])
def test_limits_below_one_are_refused(source: Sliced, limit: str) -> None:
    with pytest.raises(ValueError, match=f"{limit} is 0"):
        held_out_rows([source], row_bytes=64, **{limit: 0})  # type: ignore[list-item,arg-type]


def test_no_text_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="mock data: no text"):
        held_out_rows([Sliced(60, seed=0, num_documents=2, max_tokens=0)], row_bytes=64)  # type: ignore[list-item]


def test_an_opening_is_a_row_of_whole_tokens(source: Sliced) -> None:
    for row in held_out_rows([source], row_bytes=96):  # type: ignore[list-item]
        piece = opening(row, 20)
        size, chunks = piece.byte_ids.shape[0], piece.tokens.shape[0]
        assert size <= 21 or chunks == 2
        assert torch.equal(piece.byte_ids, row.byte_ids[:size]) and torch.equal(piece.labels, row.labels[:size])
        assert torch.equal(piece.token_labels, row.token_labels[:chunks])
        assert int(piece.bits.sum()) == chunks and bool(piece.bits[-1])
        assert len(segment_texts(piece)) == 1


def test_openings_come_from_all_over_the_text(source: Sliced) -> None:
    rows = held_out_rows([source], row_bytes=32)  # type: ignore[list-item]
    pieces = openings(rows, 64, length=16)
    assert len(pieces) == 4
    positions = [
        next(i for i, row in enumerate(rows) if row.byte_ids.data_ptr() == p.byte_ids.data_ptr()) for p in pieces
    ]
    assert positions == sorted(set(positions)) and positions[0] < len(rows) / 4 and positions[-1] > len(rows) * 3 / 4
    assert len(openings(rows, 1)) == 1
    assert len(openings(rows, 10**9)) <= len(rows)
