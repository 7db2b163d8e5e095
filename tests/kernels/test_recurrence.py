"""The blocked recurrence is the loop, for every length, through resets and for decays at both ends of their range."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megabyte_distill.kernels.recurrence import linear_recurrence


def loop(decay: Tensor, update: Tensor) -> Tensor:
    state, out = torch.zeros_like(update[0]), []
    for a, u in zip(decay, update, strict=True):
        state = a[:, None] * state + u
        out.append(state)
    return torch.stack(out)


@pytest.mark.parametrize("rows", [1, 2, 31, 32, 33, 63, 1100])
@pytest.mark.parametrize("heads", [1, 3])
def test_blocks_equal_the_loop_in_values_and_gradients(rows: int, heads: int) -> None:
    decay = torch.rand(rows, heads, dtype=torch.float64)
    decay[torch.rand(rows, heads) < 0.1] = 0.0
    decay[torch.rand(rows, heads) < 0.1] = 1.0
    update = torch.randn(rows, heads, 4, dtype=torch.float64)
    weight = torch.randn_like(update)
    results = []
    for run in (linear_recurrence, loop):
        a, u = decay.clone().requires_grad_(), update.clone().requires_grad_()
        y = run(a, u)
        grads = torch.autograd.grad((y * weight).sum(), (a, u))
        results.append((y.detach(), *grads))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_fp32_stays_exact_where_summed_logs_are_large() -> None:
    # 2,000 decays of 1e-4 and then slow ones: differences of fp32 log sums would lose four digits here.
    decay = torch.cat((torch.full((2000,), 1e-4), torch.full((2000,), 0.999)))[torch.randperm(4000)][:, None]
    update = torch.randn(4000, 1, 8)
    expected = loop(decay.double(), update.double())
    torch.testing.assert_close(linear_recurrence(decay, update).double(), expected, rtol=1e-5, atol=1e-5)


def test_an_exact_zero_decay_has_a_finite_and_right_gradient() -> None:
    decay = torch.tensor([[0.5], [0.0], [0.0], [1.0]], dtype=torch.float64, requires_grad=True)
    update = torch.randn(4, 1, 2, dtype=torch.float64, requires_grad=True)
    grad = torch.autograd.grad(linear_recurrence(decay, update).sum(), decay)[0]
    expected = torch.autograd.grad(loop(decay, update).sum(), decay)[0]
    torch.testing.assert_close(grad, expected)


def test_no_rows_give_no_rows() -> None:
    assert linear_recurrence(torch.zeros(0, 1), torch.zeros(0, 1, 3)).shape == (0, 1, 3)


def test_autocast_does_not_lower_the_precision() -> None:
    decay, update = torch.rand(100, 1), torch.randn(100, 1, 4)
    with torch.autocast("cpu", torch.bfloat16):
        inside = linear_recurrence(decay, update)
    assert torch.equal(inside, linear_recurrence(decay, update))
