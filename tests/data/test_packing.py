from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import fields

import numpy as np
import pytest
import torch

from megabyte_distill.alphabet import BOS_BYTE, END_OF_DOCUMENT_CLASS, PAD_BYTE, joint_class
from megabyte_distill.data.dataset import ByteTokenDataset
from megabyte_distill.data.mock import MockDataset
from megabyte_distill.data.packing import PackedRow, Segment, pack_row, without_document_mask
from megabyte_distill.data.sampler import RowStream, evaluation_rows

ROW, BUCKET = 64, 8


def _segment(text: bytes, lengths: list[int], after: tuple[int, int, int] | None = None) -> Segment:
    next_byte, next_token, next_length = after or (None, None, None)
    return Segment(
        document=3,
        byte_ids=np.frombuffer(text, dtype=np.uint8),
        tokens=np.arange(10, 10 + len(lengths)),
        token_lengths=np.array(lengths, dtype=np.int32),
        next_byte=next_byte,
        next_token=next_token,
        next_token_length=next_length,
    )


def _pack(segments: list[Segment], row_bytes: int = 8, chunk_bucket: int = 4) -> PackedRow:
    return pack_row(segments, row_bytes=row_bytes, chunk_bucket=chunk_bucket, start_id=1, end_of_text_id=2)


def test_one_small_row_by_hand() -> None:
    row = _pack([_segment(b"abc", [2, 1]), _segment(b"d", [1], (ord("e"), 20, 1))])
    assert row.byte_ids.tolist() == [BOS_BYTE, 97, 98, 99, BOS_BYTE, 100, PAD_BYTE, PAD_BYTE]
    assert row.bits.tolist() == [True, False, True, True, True, True, True, False]
    assert row.labels.tolist() == [97, 98 + 256, 99 + 256, END_OF_DOCUMENT_CLASS, 100 + 256, 101 + 256, 0, 0]
    assert row.is_real.tolist() == [True] * 6 + [False] * 2
    assert row.tokens.tolist() == [1, 10, 11, 1, 10, 0, 0, 0]
    assert row.token_labels.tolist() == [10, 11, 2, 10, 20, 0, 0, 0]
    assert row.token_mask.tolist() == [True] * 5 + [False] * 3
    assert row.token_ends_document.tolist() == [False, False, True] + [False] * 5
    assert row.cu_seqlens.tolist() == [0, 4, 6, 8] and row.cu_seqlens.dtype == torch.int32
    assert row.cu_chunks.tolist() == [0, 3, 5, 6, 8] and row.cu_chunks.dtype == torch.int32
    assert row.documents == (3, 3) and row.chunk_bucket == 4


def test_a_longer_next_token_has_no_bit() -> None:
    assert _pack([_segment(b"d", [1], (101, 20, 3))]).labels.tolist()[1] == 101


def test_an_empty_document_is_one_label() -> None:
    row = _pack([_segment(b"", [])], row_bytes=2, chunk_bucket=1)
    assert row.byte_ids.tolist() == [BOS_BYTE, PAD_BYTE] and row.labels.tolist() == [END_OF_DOCUMENT_CLASS, 0]
    assert row.token_labels.tolist() == [2, 0] and row.cu_seqlens.tolist() == [0, 1, 2]


def test_a_full_row_has_no_dummy_segments() -> None:
    row = _pack([_segment(b"abc", [1, 1, 1])], row_bytes=4)
    assert row.cu_seqlens.tolist() == [0, 4] and row.cu_chunks.tolist() == [0, 4]
    assert row.is_real.all() and row.token_mask.all()


def test_rows_that_do_not_fit_are_refused() -> None:
    for segments in ([], [_segment(b"abcdefgh", [8])]):
        with pytest.raises(ValueError, match="do not make a row of 8 bytes"):
            _pack(segments)


def test_to_moves_every_tensor() -> None:
    row = _pack([_segment(b"abc", [1, 2])]).to("meta")
    tensors = [getattr(row, f.name) for f in fields(row) if isinstance(getattr(row, f.name), torch.Tensor)]
    assert len(tensors) == 10 and all(tensor.is_meta for tensor in tensors)


def _check(row: PackedRow, dataset: ByteTokenDataset) -> None:
    """The relations of a row's fields, each by its slow definition."""
    table = dataset.table
    byte_ids, bits = row.byte_ids.tolist(), row.bits.tolist()
    assert row.byte_ids.shape == row.bits.shape == row.labels.shape == row.is_real.shape == (ROW,)
    capacity = row.tokens.shape[0]
    assert capacity % BUCKET == 0 and sum(bits) <= capacity < sum(bits) + BUCKET
    assert row.cu_seqlens[0] == 0 and row.cu_seqlens[-1] == ROW
    assert row.cu_chunks[0] == 0 and row.cu_chunks[-1] == capacity
    assert (row.cu_seqlens.diff() > 0).all() and (row.cu_chunks.diff() > 0).all()
    ends = [index for index, bit in enumerate(bits) if bit]
    for start, stop, first, last in zip(
        row.cu_seqlens[:-1].tolist(),
        row.cu_seqlens[1:].tolist(),
        row.cu_chunks[:-1].tolist(),
        row.cu_chunks[1:].tolist(),
        strict=False,
    ):
        if byte_ids[start] == PAD_BYTE:
            assert set(byte_ids[start:stop]) == {PAD_BYTE} and stop == ROW and last == first + 1
            assert bits[start:stop] == [True] + [False] * (stop - start - 1)
            assert not row.is_real[start:].any() and not row.labels[start:].any()
            continue
        assert byte_ids[start] == BOS_BYTE and bits[start] and bits[stop - 1] and row.is_real[start:stop].all()
        assert row.tokens[first] == table.start_id and row.token_mask[first:last].all()
        previous = start
        for chunk in range(first + 1, last):
            assert bytes(byte_ids[previous + 1 : ends[chunk] + 1]) == table[int(row.tokens[chunk])]
            previous = ends[chunk]
        for index in range(start, stop - 1):
            assert row.labels[index] == joint_class(byte_ids[index + 1], int(bits[index + 1]))
        assert row.token_labels[first : last - 1].tolist() == row.tokens[first + 1 : last].tolist()
        ends_document = bool(row.token_ends_document[last - 1])
        assert ends_document == (row.labels[stop - 1] == END_OF_DOCUMENT_CLASS)
        assert ends_document == (row.token_labels[last - 1] == table.end_of_text_id)
        assert not row.token_ends_document[first : last - 1].any()
        if not ends_document:
            following = table[int(row.token_labels[last - 1])]
            assert row.labels[stop - 1] == joint_class(following[0], int(len(following) == 1))
    real = int(row.token_mask.sum())
    assert row.token_mask[:real].all() and not row.tokens[real:].any() and not row.token_labels[real:].any()


def _segments(row: PackedRow) -> list[tuple[int, bytes, list[int], bool]]:
    found = []
    for index, document in enumerate(row.documents):
        start, stop = int(row.cu_seqlens[index]), int(row.cu_seqlens[index + 1])
        first, last = int(row.cu_chunks[index]), int(row.cu_chunks[index + 1])
        text = bytes(row.byte_ids[start + 1 : stop].tolist())
        found.append((document, text, row.tokens[first + 1 : last].tolist(), bool(row.token_ends_document[last - 1])))
    return found


def test_training_rows_hold_every_relation(dataset: ByteTokenDataset) -> None:
    stream = RowStream([dataset], row_bytes=ROW, chunk_bucket=BUCKET, seed=1)
    for plan in stream.next_rows(150):
        _check(stream.materialize(plan), dataset)


def test_evaluation_rows_rebuild_every_document_once(dataset: ByteTokenDataset) -> None:
    rows = list(evaluation_rows(dataset, row_bytes=ROW, chunk_bucket=BUCKET))
    for row in rows:
        _check(row, dataset)
    texts: dict[int, bytes] = {}
    tokens: dict[int, list[int]] = {}
    finished: list[int] = []
    for document, text, ids, ends in (segment for row in rows for segment in _segments(row)):
        assert document not in finished
        texts[document] = texts.get(document, b"") + text
        tokens[document] = tokens.get(document, []) + ids
        if ends:
            finished.append(document)
    assert finished == list(dataset.documents)
    for index in dataset.documents:
        document = dataset[index]
        assert texts[index] == document.byte_ids.tobytes() and tokens[index] == document.tokens.tolist()


def test_rows_are_filled_as_far_as_tokens_go(dataset: ByteTokenDataset) -> None:
    stream = RowStream([dataset], row_bytes=ROW, chunk_bucket=BUCKET, seed=1)
    longest = int(dataset.table.lengths.max())
    for plan in stream.next_rows(150):
        row = stream.materialize(plan)
        room = ROW - int(row.is_real.sum())
        assert room < max(16, longest + 1)
        if not plan.segments[-1].ends_document:
            assert room < len(dataset.table[int(row.token_labels[row.token_mask][-1])])


def test_a_cut_document_goes_on_with_bos(store: Callable[..., str]) -> None:
    dataset = ByteTokenDataset(store(["the wind " * 40]))
    rows = list(evaluation_rows(dataset, row_bytes=ROW, chunk_bucket=BUCKET))
    assert len(rows) > 4 and all(row.byte_ids[0] == BOS_BYTE and row.documents == (0,) for row in rows)
    for row, following in itertools.pairwise(rows):
        last = int(row.is_real.sum()) - 1
        assert row.labels[last] == following.labels[0] != END_OF_DOCUMENT_CLASS
        assert row.token_labels[row.token_mask][-1] == following.tokens[1]


def test_without_document_mask_text_is_one_segment_and_padding_stays_apart() -> None:
    for row in evaluation_rows(
        MockDataset(2000, seed=5, num_documents=40, max_tokens=30), row_bytes=64, chunk_bucket=8
    ):
        merged = without_document_mask(row)
        used, chunks = int(row.is_real.sum()), int(row.token_mask.sum())
        dummy = int(used < 64)
        assert merged.cu_seqlens.tolist() == sorted({0, used, 64})
        assert merged.cu_chunks.tolist() == sorted({0, chunks, chunks + dummy, row.tokens.shape[0]})
        assert torch.equal(merged.bits, row.bits) and torch.equal(merged.labels, row.labels)
