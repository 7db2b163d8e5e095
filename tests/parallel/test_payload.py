"""Several tensors in one payload, there and back, bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megabyte_distill.parallel.payload import Part, pack, touch, unpack

CARRIERS = [torch.bfloat16, torch.float32]


def parts_of(tensors: list[Tensor]) -> list[Part]:
    return [Part(tuple(t.shape), t.dtype) for t in tensors]


def sample(carrier: torch.dtype, sizes: tuple[int, int, int]) -> list[Tensor]:
    """p in fp32 and two states in the payload's dtype; some have no elements."""
    torch.manual_seed(sum(sizes))
    shapes = [(sizes[0],), (sizes[1], 8), (sizes[2], 1, 8)]
    dtypes = [torch.float32, carrier, carrier]
    return [torch.randn(s).to(d).requires_grad_() for s, d in zip(shapes, dtypes, strict=True)]


@given(st.sampled_from(CARRIERS), st.tuples(*[st.integers(0, 67)] * 3))
@settings(max_examples=60, deadline=None)
def test_what_is_packed_arrives_bit_for_bit(carrier: torch.dtype, sizes: tuple[int, int, int]) -> None:
    tensors = sample(carrier, sizes)
    payload = pack(tensors, carrier)
    assert payload.dim() == 3 and payload.shape[1:] == (1, 1) and payload.dtype is carrier and payload._base is None
    for sent, arrived in zip(tensors, unpack(payload, parts_of(tensors)), strict=True):
        assert arrived.dtype is sent.dtype and torch.equal(arrived, sent)


@pytest.mark.parametrize("carrier", CARRIERS)
def test_p_near_zero_and_one_is_not_rounded(carrier: torch.dtype) -> None:
    p = torch.tensor([1e-7, 1 - 6e-8, 0.5 + 6e-8, 0.0, 1.0, 1e-38])
    (arrived,) = unpack(pack([p], carrier), [Part((6,), torch.float32)])
    assert torch.equal(arrived, p)


@pytest.mark.parametrize("carrier", CARRIERS)
def test_gradients_go_back_bit_for_bit(carrier: torch.dtype) -> None:
    """Over a cut, as between processes: the payload's gradient is a tensor of its own."""
    tensors = sample(carrier, (5, 3, 4))
    payload = pack(tensors, carrier)
    received = payload.detach().requires_grad_()
    arrived = unpack(received, parts_of(tensors))
    wanted = [torch.randn(t.shape).to(t.dtype) for t in tensors]
    sum((a * w).float().sum() for a, w in zip(arrived, wanted, strict=True)).backward()  # type: ignore[union-attr]
    assert received.grad is not None and received.grad.shape == payload.shape
    payload.backward(received.grad)
    for tensor, expected in zip(tensors, wanted, strict=True):
        assert torch.equal(tensor.grad, expected)


def test_a_part_that_nobody_reads_gets_zeros() -> None:
    tensors = sample(torch.bfloat16, (5, 3, 4))
    received = pack(tensors, torch.bfloat16).detach().requires_grad_()
    unpack(received, parts_of(tensors))[1].float().sum().backward()
    first, second, third = unpack(received.grad, parts_of(tensors))
    assert not first.any() and (second == 1).all() and not third.any()


def test_a_payload_without_trained_parts_sends_a_gradient_of_zeros_back() -> None:
    received = torch.randn(7, 1, 1, requires_grad=True)
    sent = pack([torch.randn(3)], torch.float32, touch(received))
    assert sent.requires_grad
    sent.backward(torch.ones_like(sent))
    assert received.grad is not None and received.grad.shape == (7, 1, 1) and not received.grad.any()


def test_what_does_not_add_up_is_refused() -> None:
    payload = pack([torch.randn(3, 8)], torch.float32)
    with pytest.raises(ValueError, match="24 elements arrived, expected 16"):
        unpack(payload, [Part((2, 8), torch.float32)])
    with pytest.raises(ValueError, match=r"torch\.float32 cannot carry torch\.bfloat16"):
        unpack(payload, [Part((3, 8), torch.bfloat16)])
