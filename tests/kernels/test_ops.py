"""The small operators against their definitions."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from megabyte_distill.kernels import ops, reference


def test_rms_norm_equals_definition_and_returns_the_weights_dtype() -> None:
    x, weight = torch.randn(7, 16, dtype=torch.float64), torch.randn(16, dtype=torch.float64)
    torch.testing.assert_close(ops.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))
    low = ops.rms_norm(x.float(), weight.bfloat16(), 1e-5)
    assert low.dtype is torch.bfloat16
    # One rounding of the weight and one of the result: 2^-9 relative each.
    torch.testing.assert_close(low.double(), reference.rms_norm(x, weight, 1e-5), rtol=2**-7, atol=1e-6)


def test_swiglu_equals_definition() -> None:
    value, gate = torch.randn(5, 3), torch.randn(5, 3)
    torch.testing.assert_close(ops.swiglu(value, gate), reference.swiglu(value, gate))


def test_byte_embedding_is_a_residual_stream_of_at_least_fp32() -> None:
    ids, table, added = torch.tensor([254, 0, 254, 255]), torch.randn(256, 4), torch.randn(4, 4)
    torch.testing.assert_close(ops.byte_embedding(ids, table, added), reference.byte_embedding(ids, table, added))
    assert ops.byte_embedding(ids, table.bfloat16()).dtype is torch.float32
    norm = torch.randn(4)
    expected = reference.rms_norm(reference.byte_embedding(ids, table, added), norm, 1e-5)
    torch.testing.assert_close(ops.byte_embedding(ids, table, added, norm), expected)


def test_routing_probabilities_equal_definition_with_ones_at_segment_ends() -> None:
    q, k = torch.randn(9, 4, dtype=torch.float64), torch.randn(9, 4, dtype=torch.float64)
    cu_seqlens = torch.tensor([0, 1, 6, 9], dtype=torch.int32)
    p = ops.routing_probabilities(q, k, cu_seqlens)
    torch.testing.assert_close(p, reference.routing_probabilities(q, k, cu_seqlens))
    assert p[[0, 5, 8]].tolist() == [1.0, 1.0, 1.0]


def test_routing_probabilities_stay_in_the_unit_interval_in_fp32() -> None:
    q = torch.randn(500, 64)
    same = torch.cat((q[-1:], q[:-1]))
    cu_seqlens = torch.tensor([0, 500], dtype=torch.int32)
    for k in (same, -same, 1000 * same):
        p = ops.routing_probabilities(q, k, cu_seqlens)
        assert p.dtype is torch.float32
        assert bool(((p >= 0) & (p <= 1)).all())
    assert ops.routing_probabilities(q.bfloat16(), q.bfloat16(), cu_seqlens).dtype is torch.float32


def test_routing_probabilities_of_no_bytes_are_none() -> None:
    assert ops.routing_probabilities(torch.zeros(0, 4), torch.zeros(0, 4), torch.tensor([0, 0])).shape == (0,)


def test_router_and_confidence_gradient_equal_plain_autograd() -> None:
    q, k = torch.randn(8, 4, dtype=torch.float64), torch.randn(8, 4, dtype=torch.float64)
    s, weight = torch.randn(8, 4, dtype=torch.float64), torch.randn(8, 4, dtype=torch.float64)
    cu_seqlens, bits = torch.tensor([0, 5, 8]), torch.rand(8) < 0.5
    results = []
    for fast in (True, False):
        leaves = [value.clone().requires_grad_() for value in (q, k, s)]
        if fast:
            p = ops.routing_probabilities(leaves[0], leaves[1], cu_seqlens)
            z = ops.straight_through_confidence(leaves[2], torch.where(bits, p, 1 - p))
        else:
            p = reference.routing_probabilities(leaves[0], leaves[1], cu_seqlens)
            chosen = torch.where(bits, p, 1 - p)
            z = leaves[2] * (1 + chosen - chosen.detach())[:, None]
        grads = torch.autograd.grad((z * weight).sum() + (p * p).sum(), leaves)
        results.append((z.detach(), *grads))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


def test_confidence_gradient_by_hand() -> None:
    s = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    p = torch.tensor([0.9, 0.1], requires_grad=True)
    z = ops.straight_through_confidence(s, p)
    assert torch.equal(z, s)
    z.backward(torch.tensor([[1.0, 1.0], [0.5, -1.0]]))
    assert p.grad is not None and s.grad is not None
    assert p.grad.tolist() == [3.0, -2.5]
    assert s.grad.tolist() == [[1.0, 1.0], [0.5, -1.0]]


def test_chunk_pool_keeps_last_bytes_and_zeroes_padding() -> None:
    r = torch.randn(6, 3)
    pooled = ops.chunk_pool(r, torch.tensor([0, 1, 4, 6]), torch.tensor([0, 3, 5, 5]), num_chunks=3)
    assert torch.equal(pooled[:3], r[[0, 3, 5]])
    assert not pooled[3].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_joint_cross_entropy_of_hard_and_soft_targets(dtype: torch.dtype) -> None:
    logits = torch.randn(6, 512).to(dtype)
    hard, soft = torch.randint(0, 512, (6,)), torch.rand(6, 512, dtype=torch.float64).softmax(-1)
    for targets in (hard, soft):
        nll = ops.joint_cross_entropy(logits, targets)
        assert nll.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
        # The arithmetic is fp32 on the logits as given, so bf16 logits cost nothing beyond their own rounding.
        expected = reference.joint_cross_entropy(logits.double(), targets)
        torch.testing.assert_close(nll.double(), expected, rtol=1e-5, atol=1e-5)
    one_hot = F.one_hot(hard, 512).double()
    torch.testing.assert_close(ops.joint_cross_entropy(logits, one_hot), ops.joint_cross_entropy(logits, hard))


@pytest.mark.parametrize("temperature", [0.5, 3.0])
@pytest.mark.parametrize("alpha", [1.0, 0.3])
def test_gradients_at_a_temperature_are_those_of_small_differences(temperature: float, alpha: float) -> None:
    logits = (torch.randn(3, 512, dtype=torch.float64) * 2).requires_grad_()
    labels, distribution = torch.randint(0, 512, (3,)), (torch.randn(3, 512, dtype=torch.float64) * 3).softmax(-1)
    distribution[1] = 0.0

    def mixed(logits: torch.Tensor) -> torch.Tensor:
        hard, soft = ops.joint_cross_entropies(
            logits, labels, distribution, temperature=temperature, hard_has_gradient=alpha < 1
        )
        return (alpha * soft + (1 - alpha) * hard if alpha < 1 else soft).sum()

    assert torch.autograd.gradcheck(mixed, (logits,), fast_mode=True)
    weights = torch.autograd.grad(mixed(logits), logits)[0]
    # Hinton: the gradient is T (softmax(z / T) - q), of one size whatever T
    soft = temperature * ((logits.detach() / temperature).softmax(-1) - ops.soften(distribution, temperature))
    soft[1] = 0.0
    hard = logits.detach().softmax(-1) - F.one_hot(labels, 512)
    torch.testing.assert_close(weights, alpha * soft + (1 - alpha) * hard)


def test_the_temperature_changes_neither_the_hard_loss_nor_anything_at_one() -> None:
    logits, labels, distribution = torch.randn(9, 512) * 3, torch.randint(0, 512, (9,)), torch.rand(9, 512).softmax(-1)
    hard, soft = ops.joint_cross_entropies(logits, labels, distribution)
    at_one = ops.joint_cross_entropies(logits, labels, distribution, temperature=1.0)
    at_two = ops.joint_cross_entropies(logits, labels, distribution, temperature=2.0)
    assert torch.equal(hard, at_one[0]) and torch.equal(soft, at_one[1])
    assert torch.equal(hard, at_two[0]) and not torch.equal(soft, at_two[1])
    near = ops.joint_cross_entropies(logits, labels, distribution, temperature=1.0 + 1e-6)[1]
    torch.testing.assert_close(near, soft, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("temperature", [0.01, 0.5, 2.0, 100.0])
def test_softened_rows_sum_to_one_at_any_temperature(temperature: float) -> None:
    rows = torch.zeros(4, 512)
    rows[0, 7] = 1.0
    rows[1] = torch.full((512,), 1 / 512)
    rows[2, :3] = torch.tensor([0.7, 0.3 - 1e-20, 1e-20])
    softened = ops.soften(rows, temperature)
    torch.testing.assert_close(softened.sum(-1), torch.tensor([1.0, 1.0, 1.0, 0.0]))
    assert torch.equal(softened[0], rows[0]), "one pair stays one pair"
    torch.testing.assert_close(softened[1], rows[1])
    wanted = (rows[2, :2].double().log() / temperature).diff()
    torch.testing.assert_close(softened[2, 1].double() / softened[2, 0], wanted.exp()[0], rtol=1e-4, atol=1e-30)
    assert not softened[2, 3:].any()
