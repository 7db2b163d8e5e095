"""Hashed n-grams against Python's whole numbers, byte by byte, and against chance."""

from __future__ import annotations

import torch

from megabyte_distill.kernels import ops
from megabyte_distill.kernels.ngrams import ngram_indices, no_recent_bytes, step_indices
from megabyte_distill.kernels.segments import Segments

SIZES = (2, 3, 5, 8)


def by_hand(text: list[int], t: int, n: int, rows: int) -> int:
    """Row of the n-gram that ends at byte t of a document."""
    total = sum(text[t - i] * 1_000_003**i + 1_000_003**i for i in range(n) if t - i >= 0)
    return (total * 0x9E3779B97F4A7C15 % 2**64 >> 33) % rows


def test_rows_are_those_of_whole_numbers_modulo_two_to_the_64() -> None:
    lengths, rows = (1, 30, 2, 9, 200), 1009
    byte_ids, cu_seqlens = torch.randint(0, 256, (242,)), torch.tensor((0, 1, 31, 33, 42, 242))
    indices = ngram_indices(byte_ids, Segments(cu_seqlens, 242).position, SIZES, rows)
    expected = [
        [by_hand(document.tolist(), t, n, rows) + table * rows for table, n in enumerate(SIZES)]
        for document in byte_ids.split(lengths)
        for t in range(len(document))
    ]
    assert indices.tolist() == expected


def test_byte_by_byte_the_rows_are_the_same() -> None:
    byte_ids = torch.randint(0, 256, (2, 40))
    recent = no_recent_bytes(2, SIZES, torch.device("cpu"))
    for t in range(40):
        stepped, recent = step_indices(byte_ids[:, t], recent, SIZES, 77)
        for row in range(2):
            whole = ngram_indices(byte_ids[row], torch.arange(40), SIZES, 77)
            assert torch.equal(stepped[row], whole[t])


def test_rows_shorter_than_the_longest_ngram_and_empty_ones() -> None:
    for length in (0, 1, 3):
        indices = ngram_indices(torch.zeros(length, dtype=torch.int64), torch.arange(length), (2, 8), 10)
        assert indices.shape == (length, 2)


def test_different_ngrams_spread_over_a_table_as_chance_would() -> None:
    # all 2-grams, and 2-grams that differ in one bit only: of 65,536 balls in 4096 boxes each has 16, give or take 4
    pairs = torch.cartesian_prod(torch.arange(256), torch.arange(256)).flatten()
    position = torch.arange(2).repeat(65_536)
    rows = ngram_indices(pairs, position, (2,), 4096)[1::2, 0].bincount(minlength=4096)
    assert rows.shape == (4096,) and rows.min() >= 1 and rows.max() <= 64
    assert 2.0 < float(rows.double().std()) < 8.0


def test_the_embedding_is_the_sum_of_its_rows() -> None:
    byte_ids, indices = torch.randint(0, 256, (9,)), torch.randint(0, 20, (9, 3))
    table, ngram_table = torch.randn(256, 4).bfloat16(), torch.randn(20, 4).bfloat16()
    x = ops.ngram_embedding(byte_ids, indices, table, ngram_table)
    assert x.dtype is torch.float32
    expected = table.double()[byte_ids] + ngram_table.double()[indices].sum(1)
    torch.testing.assert_close(x.double(), expected, rtol=1e-6, atol=1e-6)
