"""The blocked Mamba-2 scan is the recurrence, in fp64 to rounding, whatever the block size and the segments."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from megabyte_distill.kernels import ops, reference
from megabyte_distill.kernels.segments import Segments


def inputs(length: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    heads, features, state = 2, 3, 4
    values = [
        torch.randn(length, heads, features),
        F.softplus(torch.randn(length, heads)),
        -torch.rand(heads) * 4,
        torch.randn(length, state),
        torch.randn(length, state),
    ]
    return [value.to(dtype) for value in values]


def cu(*lengths: int) -> Tensor:
    return torch.tensor((0, *lengths)).cumsum(0).to(torch.int32)


@pytest.mark.parametrize("lengths", [(1,), (63,), (1000,), (1, 1, 1), (30, 1, 33, 64, 7), (64, 64), (1, 199, 300)])
@pytest.mark.parametrize("block", [1, 16, 64, 256])
def test_scan_equals_recurrence(lengths: tuple[int, ...], block: int) -> None:
    if block == 1 and sum(lengths) > 200:
        pytest.skip("blocks of one byte add nothing at this length")
    x, dt, a, b, c = inputs(sum(lengths))
    got = ops.ssm_scan(x, dt, a, b, c, Segments(cu(*lengths), x.shape[0]), block)
    torch.testing.assert_close(got, reference.ssm_scan(x, dt, a, b, c, cu(*lengths)), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("lengths", [(50,), (16, 16), (5, 1, 20, 33)])
def test_gradients_equal_those_of_the_recurrence(lengths: tuple[int, ...]) -> None:
    results = []
    values = inputs(sum(lengths))
    weight = torch.randn_like(values[0])
    for fast in (True, False):
        x, dt, a, b, c = leaves = [value.clone().requires_grad_() for value in values]
        if fast:
            y = ops.ssm_scan(x, dt, a, b, c, Segments(cu(*lengths), x.shape[0]), 16)
        else:
            y = reference.ssm_scan(x, dt, a, b, c, cu(*lengths))
        results.append(torch.autograd.grad((y * weight).sum(), leaves))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8)


def test_strong_decay_has_finite_gradients() -> None:
    x, dt, a, b, c = inputs(80, torch.float32)
    leaves = [value.requires_grad_() for value in (x, dt * 100, a * 100, b, c)]
    leaves = [value.detach().requires_grad_() for value in leaves]
    y = ops.ssm_scan(*leaves, Segments(cu(30, 50), 80), 64)
    for grad in torch.autograd.grad(y.sum(), leaves):
        assert bool(grad.isfinite().all())


def test_bf16_inputs_are_scanned_in_fp32() -> None:
    x, dt, a, b, c = inputs(200, torch.float32)
    low = [value.bfloat16() for value in (x, b, c)]
    segments = Segments(cu(200), 200)
    y = ops.ssm_scan(low[0], dt, a, low[1], low[2], segments, 64)
    assert y.dtype is torch.float32
    expected = reference.ssm_scan(*(v.double() for v in (low[0], dt, a, low[1], low[2])), cu(200))
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ops.ssm_scan(low[0], dt, a, low[1], low[2], segments, 64), y)
