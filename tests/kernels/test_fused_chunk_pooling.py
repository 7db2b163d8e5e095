"""F3 on the CPU build of the CUDA sources against the loop over bytes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megabyte_distill.config.model import ChunkPooling
from megabyte_distill.kernels import ops, reference
from megabyte_distill.kernels.chunk_index import ChunkIndex, index_chunks
from megabyte_distill.kernels.chunk_pooling import pool_rows
from megabyte_distill.kernels.library import Library, calls
from tests.kernels.comparison import (
    assert_agrees,
    assert_registered_well,
    assert_same_in_any_order,
    values_and_gradients,
)
from tests.kernels.packed import ROWS, offsets, some_bits

POOLINGS = list(ChunkPooling)


def pool(r: Tensor, index: ChunkIndex, pooling: ChunkPooling) -> Tensor:
    return ops.chunk_pool(r, index.begins, index.ends, index.num_chunks, pooling)


def padded_definition(r: Tensor, bits: Tensor, cu_seqlens: Tensor, index: ChunkIndex, pooling: ChunkPooling) -> Tensor:
    pooled = reference.chunk_pool(r, bits, cu_seqlens, pooling)
    return torch.cat((pooled, r.new_zeros(index.ends.shape[0] - index.num_chunks, r.shape[1])))


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(
    "row, width", [("none", 16), ("one", 8), ("single", 1032), ("ones", 264), ("ragged", 40), ("long", 24)]
)
def test_equals_the_definition(
    fused: Library, row: str, width: int, density: float, dtype: torch.dtype, pooling: ChunkPooling
) -> None:
    cu_seqlens = offsets(ROWS[row])
    rows, before = int(cu_seqlens[-1]), calls["chunk_pool_forward"]
    bits = some_bits(cu_seqlens, density)
    index = index_chunks(bits, cu_seqlens, 8)
    assert_agrees(
        lambda r: pool(r, index, pooling),
        lambda r: padded_definition(r, bits, cu_seqlens, index, pooling),
        [torch.randn(rows, width).to(dtype)],
        torch.randn(index.ends.shape[0], width),
    )
    assert calls["chunk_pool_forward"] == before + 1


@pytest.mark.parametrize("pooling", POOLINGS)
def test_equals_the_loop_with_bytes_in_no_chunk_and_ties(fused: Library, pooling: ChunkPooling) -> None:
    cu_seqlens = offsets((40, 3, 57, 25))
    bits = some_bits(cu_seqlens, 0.1, closed=False)
    bits[80:] = False
    index = index_chunks(bits, cu_seqlens, 4)
    r = torch.randint(-2, 3, (125, 16)).float()
    assert_agrees(
        lambda r: pool(r, index, pooling),
        lambda r: padded_definition(r, bits, cu_seqlens, index, pooling),
        [r],
        torch.randn(index.ends.shape[0], 16),
    )


@pytest.mark.parametrize("pooling", POOLINGS)
def test_nothing_is_read_from_other_documents_or_padding(fused: Library, pooling: ChunkPooling) -> None:
    cu_seqlens = offsets((10, 12))
    bits = torch.zeros(22, dtype=torch.bool)
    bits[[4, 9, 15]] = True  # bytes 16 … 21 are in no chunk
    r, index = torch.randn(22, 8), index_chunks(bits, cu_seqlens, 8)
    r[16:] = torch.nan
    upstream = torch.randn(8, 8)
    upstream[3:] = torch.nan
    pooled, d_r = values_and_gradients(lambda r: pool(r, index, pooling), [r], upstream)
    assert bool(pooled.isfinite().all()) and bool(d_r.isfinite().all()) and not d_r[16:].any()


def test_a_nan_is_the_maximum_and_gets_the_gradient(fused: Library) -> None:
    r = torch.randn(6, 8)
    r[2:4, 0] = torch.nan
    index = index_chunks(torch.tensor([0, 0, 0, 0, 0, 1], dtype=torch.bool), offsets((6,)), 1)
    own = [
        values_and_gradients(run, [r], torch.ones(1, 8))
        for run in (
            lambda r: pool(r, index, ChunkPooling.MAX),
            lambda r: pool_rows(r, index.begins, index.ends, 1, ChunkPooling.MAX),
        )
    ]
    for mine, expected in zip(*own, strict=True):
        assert torch.equal(mine.nan_to_num(nan=9.0), expected.nan_to_num(nan=9.0))


@pytest.mark.parametrize("pooling", POOLINGS)
def test_is_the_same_in_any_order_of_threads(fused: Library, pooling: ChunkPooling) -> None:
    cu_seqlens = offsets((1, 60, 90))
    index = index_chunks(some_bits(cu_seqlens, 0.2), cu_seqlens, 8)
    own, upstream = [torch.randn(151, 1096).bfloat16()], torch.randn(index.ends.shape[0], 1096)
    assert_same_in_any_order(fused, lambda: values_and_gradients(lambda r: pool(r, index, pooling), own, upstream))


@pytest.mark.parametrize("pooling", POOLINGS)
def test_is_registered_well(fused: Library, pooling: ChunkPooling) -> None:
    cu_seqlens = offsets((5, 15))
    index = index_chunks(some_bits(cu_seqlens, 0.4), cu_seqlens, 4)
    mode = POOLINGS.index(pooling)
    r = torch.randn(20, 16, requires_grad=True)
    assert_registered_well(torch.ops.megabyte.chunk_pool, (r, index.begins, index.ends, index.num_chunks, mode))


def test_compiles_into_one_graph(fused: Library) -> None:
    cu_seqlens = offsets((5, 15))
    index = index_chunks(some_bits(cu_seqlens, 0.4), cu_seqlens, 4)
    own, upstream = [torch.randn(20, 16)], torch.randn(index.ends.shape[0], 16)

    def run(r: Tensor) -> Tensor:
        return pool(r, index, ChunkPooling.MAX).square()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for mine, expected in zip(
        values_and_gradients(compiled, own, upstream), values_and_gradients(run, own, upstream), strict=True
    ):
        assert torch.equal(mine, expected)


def test_says_what_it_does_not_take(fused: Library) -> None:
    index = index_chunks(torch.ones(2, dtype=torch.bool), offsets((2,)), 1)
    with pytest.raises(ValueError, match="width of 4, expected a multiple of 8"):
        pool(torch.zeros(2, 4), index, ChunkPooling.LAST)
    with pytest.raises(ValueError, match="got float64"):
        pool(torch.zeros(2, 8, dtype=torch.float64), index, ChunkPooling.LAST)
