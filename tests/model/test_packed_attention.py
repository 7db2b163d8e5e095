"""Attention over packed segments against the plain definition; on a GPU the fused one against it too."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megabyte_distill.model.packed_attention import packed_attention

LENGTHS = [[5], [1, 63, 1, 30], [0, 17, 0, 40], [1] * 9]
WINDOWS = [None, 1, 8, 64]


def defined(query: Tensor, key: Tensor, value: Tensor, lengths: list[int], window: int | None) -> Tensor:
    """One position and one head at a time, in fp64."""
    q, k, v = (x.double() for x in (query, key, value))
    share = q.shape[1] // k.shape[1]
    out = torch.zeros_like(q)
    start = 0
    for length in lengths:
        for t in range(start, start + length):
            first = start if window is None else max(start, t - window + 1)
            for head in range(q.shape[1]):
                weights = (k[first : t + 1, head // share] @ q[t, head] / math.sqrt(q.shape[2])).softmax(0)
                out[t, head] = weights @ v[first : t + 1, head // share]
        start += length
    return out.reshape(out.shape[0], -1)


def inputs(lengths: list[int], dtype: torch.dtype, device: str, head_dim: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(sum(lengths))
    shapes = [(sum(lengths), heads, head_dim) for heads in (4, 2, 2)]
    q, k, v = (torch.randn(shape, dtype=torch.float32).to(device, dtype).requires_grad_() for shape in shapes)
    return q, k, v


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("window", WINDOWS)
def test_segments_and_windows(lengths: list[int], window: int | None) -> None:
    q, k, v = inputs(lengths, torch.float32, "cpu")
    got, wanted = packed_attention(q, k, v, lengths, window), defined(q, k, v, lengths, window)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)
    upstream = torch.randn_like(got)
    ours = torch.autograd.grad(got, (q, k, v), upstream, retain_graph=True)
    theirs = torch.autograd.grad(wanted, (q, k, v), upstream.double())
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU: python -m pytest tests/model/test_packed_attention.py there"
)
@pytest.mark.parametrize("lengths", [*LENGTHS, [700, 3, 1500]], ids=str)
@pytest.mark.parametrize("window", WINDOWS)
def test_all_segments_in_one_call_on_a_gpu(lengths: list[int], window: int | None) -> None:
    """Within what bf16 rounds: 8 bits of mantissa on values of size 1, gradients summed over up to 1,500 positions.

    Where a gradient is nothing (a lone position's query), rounding leaves a share of the upstream one.
    """
    q, k, v = inputs(lengths, torch.bfloat16, "cuda", head_dim=64)
    edges = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device="cuda")
    got = packed_attention(q, k, v, lengths, window, cu_seqlens=edges)
    wide = [x.detach().float().requires_grad_() for x in (q, k, v)]
    wanted = packed_attention(*wide, lengths, window)
    torch.testing.assert_close(got.float(), wanted, rtol=2e-2, atol=2e-2)
    upstream = torch.randn_like(wanted)
    ours = torch.autograd.grad(got, (q, k, v), upstream.to(got.dtype))
    theirs = torch.autograd.grad(wanted, wide, upstream)
    for one, other in zip(ours, theirs, strict=True):
        assert (one.float() - other).norm() <= 2e-2 * max(other.norm(), upstream.norm())
