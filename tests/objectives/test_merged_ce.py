"""The loss of merged chunks: the teacher's bytes and the text's own bit, against its definition in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megabyte_distill.alphabet import BYTE_VOCAB, JOINT_CLASSES
from megabyte_distill.kernels.ops import joint_cross_entropy
from megabyte_distill.objectives.merged_ce import bytes_and_bit_nll

BYTES = 40


def by_definition(logits: Tensor, labels: Tensor, distribution: Tensor) -> Tensor:
    q = logits.double().softmax(-1)
    of_byte = q[:, :BYTE_VOCAB] + q[:, BYTE_VOCAB:]
    teacher = (distribution[:, :BYTE_VOCAB] + distribution[:, BYTE_VOCAB:]).double()
    bit = q.gather(1, labels[:, None]) / of_byte.gather(1, labels[:, None] % BYTE_VOCAB)
    return -(teacher * of_byte.log()).sum(-1) - bit[:, 0].log()


@pytest.fixture
def case() -> tuple[Tensor, Tensor, Tensor]:
    """Logits, labels and distributions, peaked ones and none among them."""
    torch.manual_seed(4)
    logits = 3 * torch.randn(BYTES, JOINT_CLASSES)
    distribution = (6 * torch.randn(BYTES, JOINT_CLASSES)).softmax(-1)
    distribution[:4] = 0.0  # PAD: no target
    return logits, torch.randint(0, JOINT_CLASSES, (BYTES,)), distribution


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-5), (torch.bfloat16, 4e-3)])
def test_value_and_gradient_are_those_of_the_definition(
    case: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype, tolerance: float
) -> None:
    logits, labels, distribution = case
    own = logits.to(dtype).requires_grad_()
    exact = own.detach().double().requires_grad_()
    weights = torch.randn(BYTES)
    found, expected = bytes_and_bit_nll(own, labels, distribution), by_definition(exact, labels, distribution)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=2e-5)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    assert own.grad is not None and exact.grad is not None and own.grad.dtype == dtype
    torch.testing.assert_close(own.grad.double(), exact.grad, rtol=tolerance, atol=tolerance)


def test_autograd_agrees_with_finite_differences(case: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, labels, distribution = (value[4:6] for value in case)
    own = logits.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: bytes_and_bit_nll(x, labels, distribution.double()), own, fast_mode=True)


def test_with_a_sure_teacher_it_is_the_joint_nll(case: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, labels, _ = case
    # of the two bits the teacher may be sure of either: it is not asked
    sure = torch.nn.functional.one_hot(labels % BYTE_VOCAB + BYTE_VOCAB * (labels % 2), JOINT_CLASSES).float()
    torch.testing.assert_close(bytes_and_bit_nll(logits, labels, sure), joint_cross_entropy(logits, labels))


def test_in_the_mean_over_the_teachers_bytes_it_is_the_cross_entropy_with_them(
    case: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Each byte with a bit of its own, as a merging gives it."""
    torch.manual_seed(1)
    logits, teacher = case[0][:1].double(), torch.rand(BYTE_VOCAB).double()
    teacher /= teacher.sum()
    every = torch.arange(BYTE_VOCAB)
    labels = every + BYTE_VOCAB * torch.randint(0, 2, (BYTE_VOCAB,))
    distribution = torch.cat((teacher, torch.zeros(BYTE_VOCAB))).expand(BYTE_VOCAB, -1)
    losses = bytes_and_bit_nll(logits.expand(BYTE_VOCAB, -1), labels, distribution)
    expected = -(teacher * logits.log_softmax(-1)[0, labels]).sum()
    torch.testing.assert_close((teacher * losses).sum(), expected)
