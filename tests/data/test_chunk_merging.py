"""Merged chunks: which token ends stay, the same wherever a text stands, and how long chunks become."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from megabyte_distill.alphabet import BOS_BYTE, BYTE_VOCAB, END_OF_DOCUMENT_CLASS
from megabyte_distill.config.stage import StageConfig
from megabyte_distill.data.chunk_merging import (
    LONGEST,
    STEPS,
    ChunkSchedule,
    ChunkSizes,
    bytes_and_chunks,
    merge_row,
    merged_ends,
    sample_rows,
)
from megabyte_distill.data.dataset import ByteTokenDataset
from megabyte_distill.data.micro_batch import concatenate_rows
from megabyte_distill.data.mock import MockRowStream
from megabyte_distill.data.packing import PackedRow, Segment, pack_row
from megabyte_distill.data.sampler import evaluation_rows

LIMITS = [1.5, 2.25, 3.0, 4.5, 7.0, 20.0]


def rows_of(dataset: ByteTokenDataset, row_bytes: int) -> list[PackedRow]:
    return list(evaluation_rows(dataset, row_bytes=row_bytes, chunk_bucket=8))


def one_row(tokens: list[bytes], after: bytes | None = None) -> PackedRow:
    """A document of these tokens, cut in front of the token ``after`` where there is one."""
    segment = Segment(
        document=0,
        byte_ids=np.frombuffer(b"".join(tokens), dtype=np.uint8),
        tokens=np.arange(10, 10 + len(tokens)),
        token_lengths=np.array([len(token) for token in tokens], dtype=np.int32),
        next_byte=None if after is None else after[0],
        next_token=None if after is None else 99,
        next_token_length=None if after is None else len(after),
    )
    return pack_row(
        [segment], row_bytes=3 + len(segment.byte_ids), chunk_bucket=4, start_id=1, end_of_text_id=2
    )  # PAD behind


def chunks_of(row: PackedRow) -> list[bytes]:
    """The bytes of each chunk of the row's text."""
    pieces, begun = [], bytearray()
    for byte, bit in zip(row.byte_ids.tolist(), row.bits.tolist(), strict=True):
        if byte >= BOS_BYTE:
            continue
        begun.append(byte)
        if bit:
            pieces.append(bytes(begun))
            begun.clear()
    assert not begun
    return pieces


@pytest.mark.parametrize(
    ("limit", "chunks"),
    [
        (1.0, [b"a", b" ca", b"t", b" or", b" so", b"meth", b"ing"]),
        (3.05, [b"a ca", b"t or", b" someth", b"ing"]),  # of three bytes each, by the last one
        (3.5, [b"a cat or someth", b"ing"]),
        (9.0, [b"a cat or something"]),
    ],
)
def test_weak_tokens_join_the_one_behind_them(limit: float, chunks: list[bytes]) -> None:
    row = merge_row(one_row([b"a", b" ca", b"t", b" or", b" so", b"meth", b"ing"]), limit)
    assert chunks_of(row) == chunks
    size, count = bytes_and_chunks(row, row.bits)
    assert (int(size), int(count)) == (18, len(chunks))


def test_a_run_of_weak_ends_is_cut() -> None:
    row = merge_row(one_row([b"x"] * 50), 5.0)
    assert [len(chunk) for chunk in chunks_of(row)] == [20, 20, 10]


@pytest.mark.parametrize("row_bytes", [40, 1000])
@pytest.mark.parametrize("limit", LIMITS)
def test_ends_that_stay_are_token_ends_and_labels_are_the_same_bits(
    dataset: ByteTokenDataset, row_bytes: int, limit: float
) -> None:
    longest = int(dataset.table.lengths.max())
    merges = 0
    for row in rows_of(dataset, row_bytes):
        merged = merge_row(row, limit)
        assert not (merged.bits & ~row.bits).any() and torch.equal(merged.token_ends, row.bits)
        edges = row.cu_seqlens.long()
        assert merged.bits[edges[:-1]].all()  # BOS, and the first PAD byte
        assert merged.bits[edges[1:][: len(row.documents)] - 1].all()
        assert all(len(chunk) <= LONGEST * limit + longest for chunk in chunks_of(merged))
        assert torch.equal(merged.labels % BYTE_VOCAB, row.labels % BYTE_VOCAB)
        inside = row.is_real & (row.byte_ids.roll(-1) < BOS_BYTE)
        inside[-1] = False
        assert torch.equal((merged.labels >= BYTE_VOCAB)[inside], merged.bits.roll(-1)[inside])
        is_end = row.labels == END_OF_DOCUMENT_CLASS
        assert torch.equal(merged.labels[is_end], row.labels[is_end])
        for name in ("byte_ids", "tokens", "token_labels", "token_mask", "cu_chunks", "cu_seqlens", "is_real"):
            assert getattr(merged, name) is getattr(row, name)
        merges += int((row.bits & ~merged.bits).sum())
    assert merges


def test_a_limit_of_one_and_none_merge_nothing(dataset: ByteTokenDataset) -> None:
    for row in rows_of(dataset, 100):
        assert merge_row(row, None) is row
        assert torch.equal(merge_row(row, 1.0).bits, row.bits) and torch.equal(merge_row(row, 1.0).labels, row.labels)


def bits_by_place(rows: list[PackedRow]) -> list[list[bool]]:
    """Of each real segment, its bits behind BOS."""
    found = []
    for row in rows:
        edges = pairwise(row.cu_seqlens.tolist())
        found += [row.bits[i + 1 : j].tolist() for i, j in edges if i < j and int(row.byte_ids[i]) == BOS_BYTE]
    return found


@pytest.mark.parametrize("limit", LIMITS)
def test_a_document_has_the_same_chunks_in_any_row(dataset: ByteTokenDataset, limit: float) -> None:
    """Whole documents; behind a cut, from the first end on that is strong by itself."""
    [wide] = [merge_row(row, limit) for row in rows_of(dataset, 200_000)]
    whole = dict(zip(wide.documents, bits_by_place([wide]), strict=True))
    assert len(whole) == len(dataset)
    apart = rows_of(dataset, 4000)
    joined = bits_by_place([merge_row(concatenate_rows(apart), limit)])
    assert joined == bits_by_place([merge_row(row, limit) for row in apart])
    place: dict[int, int] = {}
    cut = 0
    for row in rows_of(dataset, 64):
        merged = merge_row(row, limit)
        for document, bits in zip(row.documents, bits_by_place([merged]), strict=True):
            begin = place.get(document, 0)
            expected = whole[document][begin : begin + len(bits)]
            place[document] = begin + len(bits)
            first = 0
            if begin:
                cut += 1
                both = [i for i, pair in enumerate(zip(bits, expected, strict=True)) if all(pair)]
                first = both[0] if both else len(bits)
            assert bits[first:-1] == expected[first:-1]  # a segment's last byte ends a chunk
    assert cut > 10


@pytest.mark.parametrize(("after", "label"), [(b"e", b"e"), (b"er", b"e"), (None, bytes([BOS_BYTE]))])
@pytest.mark.parametrize("limit", [1.0, 3.0])
def test_the_label_behind_a_cut(after: bytes | None, label: bytes, limit: float) -> None:
    row = one_row([b"some", b"th"], after)
    ends = after is None or (len(after) == 1 and limit == 1.0)
    assert int(merge_row(row, limit).labels[6]) == label[0] + BYTE_VOCAB * ends


@pytest.mark.parametrize("tokens", [[], [b"a"], [b"whole"]])
def test_empty_and_one_token_documents_stay_as_they_are(tokens: list[bytes]) -> None:
    row = one_row(tokens)
    merged = merge_row(row, 30.0)
    assert torch.equal(merged.bits, row.bits) and torch.equal(merged.labels, row.labels)


def test_whether_an_end_stays_depends_on_its_token_alone() -> None:
    """Far from the place where a long run is cut."""
    rng = np.random.default_rng(0)
    seen: dict[bytes, bool] = {}
    words = [b" of", b" the", b"ing", b" stone", b"\xe3\x81\x82", b",", b" house"]
    for _ in range(20):
        tokens = [words[i] for i in rng.integers(0, len(words), size=40)]
        row = one_row(tokens)
        bits = merged_ends(row.byte_ids.numpy(), row.bits.numpy(), 5.0).bits
        for token, end in zip(tokens[:-1], np.cumsum([len(token) for token in tokens])[:-1], strict=True):
            begun = end - np.flatnonzero(bits[:end])[-1]
            if begun < LONGEST * 5.0:
                assert seen.setdefault(token, bool(bits[end])) == bool(bits[end])
    assert len(set(seen.values())) == 2 and len(seen) == len(words)


def test_merged_rows_join_to_a_micro_batch() -> None:
    rows = [merge_row(one_row([b"so", b" it", b" goes", b" on"]), 4.0), merge_row(one_row([b"a", b"b"]), 4.0)]
    joined = concatenate_rows(rows)
    assert joined.tokens[: int(joined.token_ends.sum())].tolist() == [1, 10, 11, 12, 13, 0, 1, 10, 11, 0]
    assert torch.equal(joined.bits, torch.cat([row.bits for row in rows]))


@pytest.fixture(scope="module")
def sizes() -> ChunkSizes:
    return ChunkSizes(sample_rows(MockRowStream(500, row_bytes=512, chunk_bucket=8, seed=2)))


@pytest.mark.parametrize("target", [2.5, 3.0, 4.0, 5.5, 8.0, 16.0])
def test_chunks_are_about_as_long_as_asked_for(sizes: ChunkSizes, target: float) -> None:
    limit = sizes.limit_for(target)
    assert limit is not None and (limit * STEPS).is_integer()
    assert sizes.mean(limit) == pytest.approx(target, rel=0.06)
    unseen = [merge_row(row, limit) for row in sample_rows(MockRowStream(500, row_bytes=512, chunk_bucket=8, seed=7))]
    counts = [bytes_and_chunks(row, row.bits) for row in unseen]
    assert float(sum(b for b, _ in counts) / sum(c for _, c in counts)) == pytest.approx(target, rel=0.07)


def test_tokens_that_are_long_enough_are_not_merged(sizes: ChunkSizes) -> None:
    assert 1.5 < sizes.mean(1.0) < 2.5
    assert sizes.limit_for(sizes.mean(1.0)) is None and sizes.limit_for(1.2) is None


def test_the_length_goes_linearly_to_the_target(sizes: ChunkSizes) -> None:
    config = StageConfig(target_bytes_per_chunk=6.0, target_bytes_per_chunk_start=3.0, target_bytes_per_chunk_iters=10)
    schedule = ChunkSchedule(config, sizes)
    assert [schedule.target(update) for update in (0, 3, 9, 99)] == [3.0, 4.0, 6.0, 6.0]
    assert schedule.limit(0) == sizes.limit_for(3.0) and schedule.limit(99) == sizes.limit_for(6.0)
    from_tokens = ChunkSchedule(StageConfig(target_bytes_per_chunk=6.0, target_bytes_per_chunk_iters=10), sizes)
    assert from_tokens.target(0) == sizes.mean(1.0) and from_tokens.limit(0) is None
    for ramp in (0, 1):
        at_once = StageConfig(target_bytes_per_chunk=6.0, target_bytes_per_chunk_iters=ramp)
        assert ChunkSchedule(at_once, sizes).target(0) == 6.0


def test_rows_without_text_measure_nothing() -> None:
    with pytest.raises(ValueError, match="no text to measure chunks on"):
        ChunkSizes([one_row([])])
