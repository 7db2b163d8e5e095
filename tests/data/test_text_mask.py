"""Bytes of text are counted once, and the tokens that count spell exactly them."""

from __future__ import annotations

import pytest
import torch

from megabyte_distill.alphabet import END_OF_DOCUMENT_CLASS, split_class
from megabyte_distill.data.micro_batch import concatenate_rows
from megabyte_distill.data.mock import MockDataset
from megabyte_distill.data.packing import PackedRow
from megabyte_distill.data.sampler import RowStream, evaluation_rows
from megabyte_distill.data.text_mask import document_end_positions, not_last, text_chunks, text_positions

ROW = 64


def source(max_tokens: int = 40, num_documents: int = 60) -> MockDataset:
    """Words of one to three bytes; documents shorter and longer than a row, some empty."""
    return MockDataset(2000, seed=5, num_documents=num_documents, max_tokens=max_tokens)


def spelled(row: PackedRow, dataset: MockDataset) -> bytes:
    return b"".join(dataset.table[token] for token in row.token_labels[text_chunks(row)].tolist())


def labelled(row: PackedRow) -> bytes:
    byte, _ = split_class(row.labels[text_positions(row)])
    return bytes(byte.tolist())


@pytest.mark.parametrize("max_tokens", [3, 40, 200])
def test_the_tokens_that_count_spell_the_bytes_that_count(max_tokens: int) -> None:
    dataset = source(max_tokens)
    stream = RowStream([dataset], row_bytes=ROW, chunk_bucket=8, seed=2)
    rows = [stream.materialize(plan) for plan in stream.next_rows(120)]
    for row in [*rows, *(concatenate_rows(rows[i : i + 3]) for i in range(0, 120, 3))]:
        assert labelled(row) == spelled(row, dataset)
        assert int(text_positions(row).sum()) == int(row.is_real.sum()) - len(row.documents)
    if max_tokens > 3:
        assert any(not bool(row.token_ends_document.any()) for row in rows), "no document was cut"


@pytest.mark.parametrize("max_tokens", [3, 40, 200])
def test_every_byte_of_text_counts_once_and_every_document_ends_once(max_tokens: int) -> None:
    dataset = source(max_tokens)
    rows = list(evaluation_rows(dataset, row_bytes=ROW, chunk_bucket=8))
    whole = b"".join(dataset.table.concatenate(dataset.tokens(d, 0, 10**6)).tobytes() for d in dataset.documents)
    assert b"".join(labelled(row) for row in rows) == whole
    ends = sum(int(document_end_positions(row).sum()) for row in rows)
    assert ends == len(dataset.documents) == sum(int(row.token_ends_document.sum()) for row in rows)


def test_an_end_of_document_is_no_text() -> None:
    for row in evaluation_rows(source(), row_bytes=ROW, chunk_bucket=8):
        ends = document_end_positions(row)
        assert not (ends & text_positions(row)).any() and not (row.token_ends_document & text_chunks(row)).any()
        assert (row.labels[ends] == END_OF_DOCUMENT_CLASS).all()
        assert not (row.labels[text_positions(row)] == END_OF_DOCUMENT_CLASS).any()


def test_the_last_of_each_segment_is_left_out() -> None:
    assert not_last(torch.tensor([0, 1, 3, 6], dtype=torch.int32), 6).tolist() == [0, 1, 0, 1, 1, 0]
