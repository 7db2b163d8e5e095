"""Chunk pooling against the loop over bytes, in values and gradients."""

from __future__ import annotations

import pytest
import torch

from megabyte_distill.config.model import ChunkPooling
from megabyte_distill.kernels import ops, reference

POOLINGS = list(ChunkPooling)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_pooling_equals_the_loop_where_some_bytes_are_in_no_chunk(pooling: ChunkPooling, density: float) -> None:
    cu_seqlens = torch.tensor((0, 1, 40, 42, 100), dtype=torch.int32)
    bits = torch.rand(100) < density
    index = ops.chunk_index(bits, cu_seqlens, bucket=8)
    # few different values: many maxima are met more than once
    values = torch.randint(-2, 3, (100, 16), dtype=torch.float64)
    weight = torch.randn(index.ends.shape[0], 16, dtype=torch.float64)
    results = []
    for fast in (True, False):
        r = values.clone().requires_grad_()
        if fast:
            pooled = ops.chunk_pool(r, index.begins, index.ends, index.num_chunks, pooling)
            assert not pooled[index.num_chunks :].any()
        else:
            pooled = reference.chunk_pool(r, bits, cu_seqlens, pooling)
        grad = torch.autograd.grad((pooled * weight[: pooled.shape[0]]).sum(), r)[0]
        results.append((pooled.detach()[: index.num_chunks], grad))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_bf16_states_are_pooled_in_fp32(pooling: ChunkPooling) -> None:
    cu_seqlens, bits = torch.tensor([0, 600]), torch.zeros(600, dtype=torch.bool)
    bits[[0, 299, 599]] = True
    index, r = ops.chunk_index(bits, cu_seqlens, bucket=1), torch.randn(600, 8).bfloat16()
    pooled = ops.chunk_pool(r, index.begins, index.ends, index.num_chunks, pooling)
    assert pooled.dtype is torch.bfloat16
    # one rounding at the end: half a bf16 unit
    expected = reference.chunk_pool(r.double(), bits, cu_seqlens, pooling)
    torch.testing.assert_close(pooled.double(), expected, rtol=2**-8, atol=1e-6)


def test_a_nan_is_the_maximum_and_gets_the_gradient() -> None:
    r = torch.tensor([[1.0], [torch.nan], [3.0]], requires_grad=True)
    pooled = ops.chunk_pool(r, torch.tensor([0]), torch.tensor([2]), 1, ChunkPooling.MAX)
    assert bool(pooled.isnan().all())
    assert torch.autograd.grad(pooled.sum(), r)[0].flatten().tolist() == [0.0, 1.0, 0.0]


def test_runs_of_what_is_not_text_are_one_chunk() -> None:
    p, byte_ids = torch.tensor([0.1, 0.9, 0.1, 0.9, 0.1]), torch.tensor([254, 1, 2, 255, 255])
    is_text = torch.tensor([True, True, True, False, False])
    bits = ops.boundary_bits(p, byte_ids, is_text, 0.5, 254)
    assert bits.tolist() == [True, True, False, True, False]
    assert ops.boundary_bits(p, byte_ids).tolist() == [False, True, False, True, False]
