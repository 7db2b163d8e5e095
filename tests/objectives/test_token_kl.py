"""Reverse KL on full logits: value and gradient against torch, at both ends of the scale."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megabyte_distill.objectives.token_kl import reverse_kl


def by_torch(student: Tensor, teacher: Tensor) -> Tensor:
    """Σ p_s (log p_s − log p_t), by torch's own operators."""
    log_s, log_t = student.log_softmax(-1), teacher.log_softmax(-1)
    return torch.nn.functional.kl_div(log_t, log_s, reduction="none", log_target=True).sum(-1)


def value_and_gradient(kl: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
    weights = torch.linspace(0.5, 2, kl.shape[0], dtype=kl.dtype)
    (gradient,) = torch.autograd.grad((kl * weights).sum(), student)
    return kl.detach(), gradient


@pytest.mark.parametrize("scale", [0.1, 3.0, 40.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_value_and_gradient_equal_fp64_autograd(scale: float, dtype: torch.dtype) -> None:
    student = (torch.randn(7, 300, dtype=torch.float64) * scale).to(dtype).requires_grad_()
    teacher = (torch.randn(7, 300, dtype=torch.float64) * scale).to(dtype)
    wide = student.detach().double().requires_grad_()
    expected = value_and_gradient(by_torch(wide, teacher.double()), wide)
    kl, gradient = value_and_gradient(reverse_kl(student, teacher), student)
    assert kl.dtype is torch.float32 and gradient.dtype is dtype
    torch.testing.assert_close(kl.double(), expected[0], rtol=2e-6, atol=1e-6)
    # log-probabilities reach a few times ``scale`` and are rounded to 2^-24 of that
    torch.testing.assert_close(gradient.double(), expected[1], rtol=1e-4, atol=1e-6 + scale * 2**-22)


def test_peaked_distributions_give_their_distance() -> None:
    student = torch.full((2, 50), -200.0)
    teacher = torch.full((2, 50), -200.0)
    student[:, 3] = 200.0
    teacher[0, 3] = 200.0
    teacher[1, 4] = 200.0
    student.requires_grad_()
    kl, gradient = value_and_gradient(reverse_kl(student, teacher), student)
    assert kl.tolist() == [0.0, 400.0]
    assert gradient.isfinite().all()


def test_a_student_that_agrees_has_zero_loss_and_exactly_zero_gradient() -> None:
    logits = (torch.randn(5, 40) * 10).requires_grad_()
    kl, gradient = value_and_gradient(reverse_kl(logits, logits.detach().clone()), logits)
    assert not kl.any() and not gradient.any()
    shifted, gradient = value_and_gradient(reverse_kl(logits, logits.detach() + 3), logits)
    assert shifted.abs().max() < 1e-5 and gradient.abs().max() < 1e-5


def test_it_is_the_reverse_direction_and_not_negative() -> None:
    student, teacher = torch.tensor([[0.9, 0.1]]).log(), torch.tensor([[0.5, 0.5]]).log()
    expected = 0.9 * torch.log(torch.tensor(1.8)) + 0.1 * torch.log(torch.tensor(0.2))
    torch.testing.assert_close(reverse_kl(student, teacher)[0], expected)
    assert (reverse_kl(torch.randn(200, 9) * 5, torch.randn(200, 9) * 5) >= -1e-6).all()


def test_only_the_student_gets_a_gradient() -> None:
    student, teacher = torch.randn(3, 8, requires_grad=True), torch.randn(3, 8, requires_grad=True)
    reverse_kl(student, teacher).sum().backward()
    assert student.grad is not None and teacher.grad is None


def test_bf16_logits_are_compared_in_fp32() -> None:
    student, teacher = torch.randn(4, 100).bfloat16().requires_grad_(), torch.randn(4, 100).bfloat16()
    kl, gradient = value_and_gradient(reverse_kl(student, teacher), student)
    torch.testing.assert_close(kl, by_torch(student.detach().float(), teacher.float()))
    assert kl.dtype is torch.float32 and gradient.dtype is torch.bfloat16


def test_inputs_stay_as_they_are() -> None:
    student, teacher = torch.randn(4, 10, requires_grad=True), torch.randn(4, 10)
    before = student.detach().clone(), teacher.clone()
    reverse_kl(student, teacher).sum().backward()
    assert torch.equal(student.detach(), before[0]) and torch.equal(teacher, before[1])
