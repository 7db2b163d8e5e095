"""The layout that bits and segments give."""

from __future__ import annotations

import pytest
import torch

from megabyte_distill.model.chunking import chunk_layout, pool_chunks


def bits(text: str) -> torch.Tensor:
    return torch.tensor([sign == "1" for sign in text])


def test_layout_of_two_segments_by_hand() -> None:
    layout = chunk_layout(bits("1001" + "101"), torch.tensor([0, 4, 7], dtype=torch.int32), bucket=1)
    assert layout.ends.tolist() == [0, 3, 4, 6]
    assert layout.begins.tolist() == [0, 1, 4, 5]
    assert layout.chunk_of_byte.tolist() == [0, 0, 0, 1, 2, 2, 3]
    assert layout.cu_chunks.tolist() == [0, 2, 4]
    assert layout.cu_chunks.dtype is torch.int32
    assert layout.starts.tolist() == [True, False, True, False]
    assert layout.num_chunks == 4


def test_padding_to_a_bucket_is_one_dummy_segment() -> None:
    layout = chunk_layout(bits("1001" + "101"), torch.tensor([0, 4, 7], dtype=torch.int32), bucket=8)
    assert layout.ends.tolist() == [0, 3, 4, 6, 6, 6, 6, 6]
    assert layout.begins.tolist() == [0, 1, 4, 5, 7, 7, 7, 7]
    assert layout.cu_chunks.tolist() == [0, 2, 4, 8]
    assert layout.starts.tolist() == [True, False, True, False, True, False, False, False]
    assert layout.num_chunks == 4
    r = torch.randn(7, 2)
    assert torch.equal(pool_chunks(r, layout)[:4], r[[0, 3, 4, 6]])
    assert not pool_chunks(r, layout)[4:].any()


def test_bytes_before_a_segments_first_end_have_no_chunk() -> None:
    layout = chunk_layout(bits("011" + "001"), torch.tensor([0, 3, 6], dtype=torch.int32), bucket=1)
    assert layout.chunk_of_byte.tolist() == [-1, 0, 1, -1, -1, 2]
    assert layout.cu_chunks.tolist() == [0, 2, 3]
    assert layout.begins.tolist() == [0, 2, 3]


def test_bytes_behind_a_segments_last_end_are_in_no_chunk() -> None:
    layout = chunk_layout(bits("100" + "0100"), torch.tensor([0, 3, 7], dtype=torch.int32), bucket=1)
    assert layout.begins.tolist() == [0, 3] and layout.ends.tolist() == [0, 4]


def test_segments_of_one_byte_are_one_chunk_each() -> None:
    layout = chunk_layout(bits("111"), torch.tensor([0, 1, 2, 3], dtype=torch.int32), bucket=1)
    assert layout.cu_chunks.tolist() == [0, 1, 2, 3]
    assert layout.starts.all()


def test_an_empty_row_has_no_chunks() -> None:
    layout = chunk_layout(torch.zeros(0, dtype=torch.bool), torch.tensor([0], dtype=torch.int32), bucket=4)
    assert layout.num_chunks == 0
    assert layout.ends.shape == layout.chunk_of_byte.shape == (0,)


def test_a_bucket_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="bucket"):
        chunk_layout(bits("1"), torch.tensor([0, 1], dtype=torch.int32), bucket=0)
