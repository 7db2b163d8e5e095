"""A micro-batch is one longer packed row: nothing of its rows is lost, moved or joined."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megabyte_distill.data.micro_batch import concatenate_rows
from megabyte_distill.data.mock import MockDataset
from megabyte_distill.data.packing import PackedRow
from megabyte_distill.data.sampler import RowStream
from megabyte_distill.model.chunking import chunk_layout

BUCKET = 8
OF_BYTES = ("byte_ids", "bits", "labels", "is_real")
OF_CHUNKS = ("tokens", "token_labels", "token_mask", "token_ends_document")


def rows_of(count: int, seed: int = 0, max_tokens: int = 25, bucket: int = BUCKET) -> list[PackedRow]:
    source = MockDataset(200, seed=seed, max_tokens=max_tokens)
    stream = RowStream([source], row_bytes=48, chunk_bucket=bucket, seed=seed)
    return [stream.materialize(plan) for plan in stream.next_rows(count)]


def chunks(row: PackedRow) -> int:
    return int(row.bits.sum())


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("bucket", [1, 8, 64])
def test_every_field_is_the_rows_fields_in_order(count: int, bucket: int) -> None:
    for seed in range(6):
        rows = rows_of(count, seed, bucket=bucket)
        batch = concatenate_rows(rows)
        for name in OF_BYTES:
            assert torch.equal(getattr(batch, name), torch.cat([getattr(row, name) for row in rows]))
        real = sum(chunks(row) for row in rows)
        for name in OF_CHUNKS:
            expected = torch.cat([getattr(row, name)[: chunks(row)] for row in rows])
            assert torch.equal(getattr(batch, name)[:real], expected)
            assert not getattr(batch, name)[real:].any()
        assert batch.tokens.shape[0] == -(-real // bucket) * bucket
        assert batch.documents == tuple(document for row in rows for document in row.documents)
        assert batch.chunk_bucket == bucket


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("bucket", [1, 8, 64])
def test_segments_stay_apart(count: int, bucket: int) -> None:
    for seed in range(6):
        rows = rows_of(count, seed, bucket=bucket)
        batch = concatenate_rows(rows)
        lengths = [length for row in rows for length in row.cu_seqlens.diff().tolist()]
        assert batch.cu_seqlens.diff().tolist() == lengths and batch.cu_seqlens[0] == 0
        assert batch.cu_seqlens.dtype is torch.int32 and batch.cu_chunks.dtype is torch.int32
        # what the model makes of the bits is what the row says of its chunks
        layout = chunk_layout(batch.bits, batch.cu_seqlens, bucket)
        assert torch.equal(layout.cu_chunks, batch.cu_chunks)
        assert layout.ends.shape == batch.tokens.shape
        assert torch.equal(batch.token_mask[: layout.num_chunks], batch.is_real[layout.ends[: layout.num_chunks]])


def test_batches_may_be_batched_again() -> None:
    rows = rows_of(5)
    nested, flat = concatenate_rows([concatenate_rows(rows[:2]), concatenate_rows(rows[2:])]), concatenate_rows(rows)
    for name in (*OF_BYTES, *OF_CHUNKS, "cu_seqlens", "cu_chunks"):
        assert torch.equal(getattr(nested, name), getattr(flat, name)), name


def test_one_row_is_itself() -> None:
    (row,) = rows_of(1)
    assert concatenate_rows([row]) is row


def test_no_rows_and_differing_buckets_are_refused() -> None:
    rows = rows_of(2)
    with pytest.raises(ValueError, match=r"one chunk bucket, got \[\]"):
        concatenate_rows([])
    with pytest.raises(ValueError, match=r"got \[8, 4\]"):
        concatenate_rows([rows[0], replace(rows[1], chunk_bucket=4)])
