"""Stage 1b's loss: reverse Kullback–Leibler divergence between student's and teacher's next-token distributions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _ReverseKL(torch.autograd.Function):
    """KL(student ‖ teacher) per row with its gradient in closed form: p_s (log p_s − log p_t − KL).

    Keeps one [M, W] tensor for the backward instead of the four that autograd would.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        difference = student.float().log_softmax(-1)
        probability = difference.exp()
        difference -= teacher.float().log_softmax(-1)
        kl = (probability * difference).sum(-1)
        gradient = probability.mul_(difference.sub_(kl[:, None]))
        ctx.save_for_backward(gradient)
        ctx.dtype = student.dtype
        return kl

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * outputs[0][:, None]).to(ctx.dtype), None


def reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """Σ_w p_s (log p_s − log p_t) in nats, fp32 [M], of logits [M, W] at temperature 1 over the whole vocabulary.

    Only the student receives a gradient.
    """
    return _ReverseKL.apply(student, teacher.detach())  # type: ignore[no-any-return,no-untyped-call]
