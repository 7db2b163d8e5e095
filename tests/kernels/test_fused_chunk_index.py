"""F2's bits and chunk index on the CPU build of the CUDA sources: integers, equal to torch's exactly."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megabyte_distill.kernels import ops
from megabyte_distill.kernels.chunk_index import index_chunks, threshold_bits
from megabyte_distill.kernels.library import Library, calls
from tests.kernels.comparison import assert_registered_well, assert_same_in_any_order
from tests.kernels.packed import ROWS, offsets, some_bits


def assert_index_is_torchs(bits: Tensor, cu_seqlens: Tensor, bucket: int) -> None:
    got, expected = ops.chunk_index(bits, cu_seqlens, bucket), index_chunks(bits, cu_seqlens, bucket)
    assert got.num_chunks == expected.num_chunks
    for name in ("ends", "begins", "chunk_of_byte", "cu_chunks", "starts"):
        mine, wanted = getattr(got, name), getattr(expected, name)
        assert mine.dtype is wanted.dtype, name
        assert mine.shape == wanted.shape, name
        places = (mine != wanted).nonzero()[:3, 0]
        assert not len(places), f"{name} at {places.tolist()}: {mine[places].tolist()} for {wanted[places].tolist()}"


@pytest.mark.parametrize("bucket", [1, 8])
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("closed", [True, False])
@pytest.mark.parametrize("row", ROWS)
def test_index_equals_torchs(fused: Library, row: str, closed: bool, density: float, bucket: int) -> None:
    cu_seqlens = offsets(ROWS[row])
    assert_index_is_torchs(some_bits(cu_seqlens, density, closed=closed), cu_seqlens, bucket)


@pytest.mark.parametrize("length", [2047, 2048, 2049, 9000])
@pytest.mark.parametrize("density", [0.0, 1e-3, 0.3])
def test_an_index_over_several_tiles_equals_torchs(fused: Library, length: int, density: float) -> None:
    before = calls["chunk_index"]
    for lengths in ((length,), (17, length - 17), (1,) * 300 + (length - 300,)):
        cu_seqlens = offsets(lengths)
        assert_index_is_torchs(some_bits(cu_seqlens, density, closed=False), cu_seqlens, 64)
    assert calls["chunk_index"] == before + 3


def test_index_is_the_same_in_any_order_of_threads(fused: Library) -> None:
    cu_seqlens = offsets((1, 3000, 2, 1500))
    bits = some_bits(cu_seqlens, 0.2, closed=False)
    assert_same_in_any_order(fused, lambda: list(ops.chunk_index(bits, cu_seqlens, 8))[:5])


@pytest.mark.parametrize("start_byte", [None, 254])
@pytest.mark.parametrize("text", [True, False])
def test_thresholding_equals_torchs(fused: Library, start_byte: int | None, text: bool) -> None:
    p, byte_ids = torch.rand(700), torch.randint(250, 256, (700,))
    p[:3] = torch.tensor([0.8, torch.nan, 0.8])
    is_text = None if text else torch.rand(700) < 0.7
    for threshold in (0.8, 0.0, 1.0, -1.0):
        got = ops.boundary_bits(p, byte_ids, is_text, threshold, start_byte)
        assert torch.equal(got, threshold_bits(p, byte_ids, is_text, threshold, start_byte))


def test_thresholding_of_no_bytes_gives_none(fused: Library) -> None:
    assert ops.boundary_bits(torch.zeros(0), torch.zeros(0, dtype=torch.int64)).shape == (0,)


def test_are_registered_well(fused: Library) -> None:
    p, byte_ids = torch.rand(30), torch.randint(0, 256, (30,))
    assert_registered_well(torch.ops.megabyte.boundary_bits, (p, byte_ids, p > 0.1, 0.5, 254))
    assert_registered_well(torch.ops.megabyte.chunk_index, (p > 0.5, offsets((10, 20)), 8))
