"""The depthwise convolution against its loop, on both of its paths."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megabyte_distill.kernels import reference
from megabyte_distill.kernels.segment_conv import segment_conv
from megabyte_distill.kernels.segments import Segments


def gradients(y: Tensor, leaves: list[Tensor], weight: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad((y * weight).sum(), leaves)


# The first two rows are long enough a segment for the path that walks over runs, the others take the masked one.
@pytest.mark.parametrize("lengths", [(200,), (3, 150, 100), (1, 1, 1), (1, 5, 2, 30), (63,)])
@pytest.mark.parametrize("dilation", [1, 8])
@pytest.mark.parametrize("taps", [1, 4])
def test_op_equals_loop_in_values_and_gradients(lengths: tuple[int, ...], dilation: int, taps: int) -> None:
    cu_seqlens = torch.tensor((0, *lengths)).cumsum(0).to(torch.int32)
    length = int(cu_seqlens[-1])
    values = [torch.randn(length, 3), torch.randn(3, taps), torch.randn(3)]
    weight = torch.randn(length, 3, dtype=torch.float64)
    results = []
    for fast in (True, False):
        leaves = [value.double().requires_grad_() for value in values]
        x, kernel, bias = leaves
        if fast:
            y = segment_conv(x, kernel, bias, Segments(cu_seqlens, length), dilation)
        else:
            y = reference.segment_conv(x, kernel, bias, cu_seqlens, dilation)
        results.append((y.detach(), *gradients(y, leaves, weight)))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("lengths", [(150, 150), (4, 4, 4)])
def test_nothing_reaches_over_a_segment_start_not_even_a_nan(lengths: tuple[int, ...]) -> None:
    cu_seqlens = torch.tensor((0, *lengths)).cumsum(0).to(torch.int32)
    x = torch.randn(int(cu_seqlens[-1]), 2)
    x[: lengths[0]] = torch.nan
    y = segment_conv(x, torch.randn(2, 4), None, Segments(cu_seqlens, x.shape[0]), 1)
    assert bool(y[lengths[0] :].isfinite().all())


def test_low_precision_input_keeps_its_dtype_under_fp32_weights() -> None:
    x = torch.randn(100, 2).bfloat16().requires_grad_()
    y = segment_conv(x, torch.randn(2, 4), None, Segments(torch.tensor([0, 100]), 100), 1)
    y.float().sum().backward()
    assert y.dtype is torch.bfloat16
    assert x.grad is not None and x.grad.dtype is torch.bfloat16
