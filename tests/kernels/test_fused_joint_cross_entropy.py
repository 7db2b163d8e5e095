"""F5 on the CPU build of the CUDA sources against the definition; overwriting corrupts nothing silently."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megabyte_distill.alphabet import JOINT_CLASSES
from megabyte_distill.kernels import ops, reference
from megabyte_distill.kernels.library import Library, calls
from tests.kernels.comparison import (
    assert_agrees,
    assert_registered_well,
    assert_same_in_any_order,
    values_and_gradients,
)


def some_logits(rows: int, dtype: torch.dtype, scale: float = 3.0) -> Tensor:
    return (torch.randn(rows, JOINT_CLASSES) * scale).to(dtype)


def some_labels(rows: int) -> Tensor:
    return torch.randint(0, JOINT_CLASSES, (rows,))


def some_distribution(rows: int) -> Tensor:
    """Rows that sum to one, are zero, as on bytes that are not wanted, or are one class."""
    distribution = (torch.randn(rows, JOINT_CLASSES) * 4).softmax(-1)
    distribution[::5] = 0.0
    distribution[1::5] = torch.nn.functional.one_hot(some_labels(len(distribution[1::5])), JOINT_CLASSES).float()
    return distribution


def some_upstream(rows: int) -> Tensor:
    """Gradients [rows] of which some are zero, as on masked bytes."""
    return torch.randn(rows) * (torch.rand(rows) < 0.7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("soft", [True, False])
@pytest.mark.parametrize("rows", [0, 1, 63, 1000])
@pytest.mark.parametrize("overwrite", [True, False])
def test_equals_the_definition(fused: Library, rows: int, soft: bool, dtype: torch.dtype, overwrite: bool) -> None:
    targets = some_distribution(rows) if soft else some_labels(rows)
    before = calls["joint_cross_entropy_forward"]
    assert_agrees(
        # a copy: overwriting takes the caller's memory
        lambda logits: ops.joint_cross_entropy(logits * 1.0, targets, overwrite_logits=overwrite),
        lambda logits: reference.joint_cross_entropy(logits, targets.to(logits.dtype) if soft else targets),
        [some_logits(rows, dtype)],
        some_upstream(rows),
    )
    assert calls["joint_cross_entropy_forward"] == before + 1


@pytest.mark.parametrize("overwrite", [True, False])
def test_both_targets_in_one_pass_add_their_gradients(fused: Library, overwrite: bool) -> None:
    logits, labels, distribution = some_logits(50, torch.float32), some_labels(50), some_distribution(50)
    on_hard, on_soft = some_upstream(50), some_upstream(50)

    def mixed(logits: Tensor) -> Tensor:
        hard, soft = ops.joint_cross_entropies(logits * 1.0, labels, distribution, overwrite_logits=overwrite)
        return on_hard * hard + on_soft * soft

    def definition(logits: Tensor) -> Tensor:
        soft = reference.joint_cross_entropy(logits, distribution.to(logits.dtype))
        return on_hard * reference.joint_cross_entropy(logits, labels) + on_soft * soft

    before = calls["joint_cross_entropy_forward"]
    assert_agrees(mixed, definition, [logits], torch.randn(50))
    assert calls["joint_cross_entropy_forward"] == before + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "temperature"), [(1, 2.0), (63, 0.5), (1000, 3.0)])
@pytest.mark.parametrize("is_mixed", [True, False])
def test_a_temperature_equals_the_definition_in_two_passes(
    fused: Library, rows: int, temperature: float, dtype: torch.dtype, is_mixed: bool
) -> None:
    labels, distribution, on_soft = some_labels(rows), some_distribution(rows), some_upstream(rows)

    def loss(logits: Tensor) -> Tensor:
        hard, soft = ops.joint_cross_entropies(
            logits * 1.0,
            labels,
            distribution,
            temperature=temperature,
            hard_has_gradient=is_mixed,
            overwrite_logits=True,
        )
        return on_soft * soft + hard * is_mixed

    def definition(logits: Tensor) -> Tensor:
        soft = reference.softened_cross_entropy(logits, distribution.to(logits.dtype), temperature)
        return on_soft * soft + (reference.joint_cross_entropy(logits, labels) if is_mixed else 0.0)

    before = {name: calls[f"joint_cross_entropy_{name}"] for name in ("forward", "backward")}
    assert_agrees(loss, definition, [some_logits(rows, dtype)], torch.ones(rows))
    now = {name: calls[f"joint_cross_entropy_{name}"] - number for name, number in before.items()}
    assert now == {"forward": 2, "backward": 1 + is_mixed}


def test_at_temperature_one_there_is_one_pass(fused: Library) -> None:
    logits, labels, distribution = some_logits(63, torch.float32), some_labels(63), some_distribution(63)
    before = calls["joint_cross_entropy_forward"]
    found = ops.joint_cross_entropies(logits, labels, distribution, temperature=1.0)
    assert calls["joint_cross_entropy_forward"] == before + 1
    assert all(map(torch.equal, found, ops.joint_cross_entropies(logits, labels, distribution)))


def test_large_logits_neither_overflow_nor_lose_the_loss(fused: Library) -> None:
    logits = some_logits(20, torch.float32, scale=30.0) + 1e4
    labels, distribution = logits.argmax(-1), some_distribution(20)
    hard, soft = ops.joint_cross_entropies(logits, labels, distribution)
    log_p = logits.double().log_softmax(-1)
    torch.testing.assert_close(hard.double(), -log_p.gather(1, labels[:, None])[:, 0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(soft.double(), -(distribution.double() * log_p).sum(-1), rtol=1e-4, atol=1e-5)


def test_is_the_same_in_any_order_of_threads(fused: Library) -> None:
    labels, distribution, own = some_labels(21), some_distribution(21), [some_logits(21, torch.bfloat16)]

    def run(logits: Tensor) -> Tensor:
        return torch.stack(ops.joint_cross_entropies(logits, labels, distribution)).sum(0)

    assert_same_in_any_order(fused, lambda: values_and_gradients(run, own, torch.ones(21)))


def test_the_gradient_takes_the_place_of_the_logits_and_nothing_else(fused: Library) -> None:
    source, labels = some_logits(9, torch.bfloat16).requires_grad_(), some_labels(9)
    logits = source * 1.0
    hard = ops.joint_cross_entropy(logits, labels, overwrite_logits=True)
    kept, before = hard.detach().clone(), logits.detach().clone()
    assert torch.equal(logits, before), "the forward leaves the logits alone"
    gradients: list[Tensor] = []
    logits.register_hook(gradients.append)
    hard.sum().backward()
    assert gradients[0].data_ptr() == logits.data_ptr()
    assert torch.equal(source.grad, logits) and torch.equal(hard, kept)


def test_who_needs_overwritten_logits_gets_an_error(fused: Library) -> None:
    labels, distribution = some_labels(9), some_distribution(9)
    logits = some_logits(9, torch.float32).requires_grad_() * 1.0
    twice = ops.joint_cross_entropy(logits, labels, overwrite_logits=True)
    twice = twice + ops.joint_cross_entropy(logits, distribution, overwrite_logits=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        twice.sum().backward()
    logits = some_logits(9, torch.float32).requires_grad_() * 1.0
    again = ops.joint_cross_entropy(logits, labels, overwrite_logits=True).sum()
    again.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        again.backward()
    activated = (some_logits(9, torch.float32).requires_grad_() * 1.0).tanh()  # its backward reads its own result
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        ops.joint_cross_entropy(activated, labels, overwrite_logits=True).sum().backward()


def test_logits_without_gradient_are_never_overwritten(fused: Library) -> None:
    logits = some_logits(9, torch.float32)
    before = logits.clone()
    ops.joint_cross_entropy(logits, some_labels(9), overwrite_logits=True)
    with torch.no_grad():
        ops.joint_cross_entropy(logits.requires_grad_(), some_labels(9), overwrite_logits=True)
    assert torch.equal(logits, before)


def test_a_leaf_is_never_overwritten(fused: Library) -> None:
    leaf = some_logits(9, torch.float32).requires_grad_()
    before = leaf.detach().clone()
    ops.joint_cross_entropy(leaf, some_labels(9), overwrite_logits=True).sum().backward()
    assert torch.equal(leaf, before) and leaf.grad is not None and leaf.grad.data_ptr() != leaf.data_ptr()


def test_a_label_outside_the_classes_is_nan_and_disturbs_no_other(fused: Library) -> None:
    logits, labels = some_logits(5, torch.float32), torch.tensor([0, -100, 512, 511, 3])
    hard = ops.joint_cross_entropy(logits, labels)
    assert hard.isnan().tolist() == [False, True, True, False, False]


@pytest.mark.parametrize("soft", [True, False])
def test_is_registered_well(fused: Library, soft: bool) -> None:
    logits = some_logits(6, torch.float32).requires_grad_()
    labels, distribution = some_labels(6), some_distribution(6) if soft else None
    assert_registered_well(torch.ops.megabyte.joint_cross_entropy, (logits, labels, distribution))
    log_sum, grads = logits.detach().logsumexp(-1), (torch.randn(6), torch.randn(6) if soft else None)
    given = (*grads, logits.detach(), labels, distribution, log_sum)
    assert_registered_well(torch.ops.megabyte.joint_cross_entropy_backward, given)
    assert_registered_well(torch.ops.megabyte.joint_cross_entropy_backward_, given)


@pytest.mark.parametrize("overwrite", [True, False])
def test_compiles_into_one_graph(fused: Library, overwrite: bool) -> None:
    labels, own, upstream = some_labels(9), [some_logits(9, torch.float32)], torch.randn(9)

    def run(logits: Tensor) -> Tensor:
        return ops.joint_cross_entropy(logits * 2.0, labels, overwrite_logits=overwrite)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for mine, expected in zip(
        values_and_gradients(compiled, own, upstream), values_and_gradients(run, own, upstream), strict=True
    ):
        assert torch.equal(mine, expected)


def test_says_what_it_does_not_take(fused: Library) -> None:
    with pytest.raises(ValueError, match="got 256 classes, expected 512"):
        ops.joint_cross_entropy(torch.zeros(2, 256), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="wants a gradient, expected a constant"):
        ops.joint_cross_entropy(torch.zeros(2, 512), torch.zeros(2, 512, requires_grad=True))
