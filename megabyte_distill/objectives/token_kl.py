"""Stage 1b's loss: reverse Kullback–Leibler divergence between student's and teacher's next-token distributions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megabyte_distill.parallel.vocabulary import VocabularyColumns


class _ReverseKL(torch.autograd.Function):
    """KL(student ‖ teacher) per row with its gradient in closed form: p_s (log p_s − log p_t − KL).

    Keeps one tensor of this rank's columns for the backward instead of the four that autograd would.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, columns: VocabularyColumns) -> Tensor:
        difference = columns.log_softmax(student.float())
        probability = difference.exp()
        difference -= columns.log_softmax(teacher.float())
        kl = columns.total((probability * difference).sum(-1))
        gradient = probability.mul_(difference.sub_(kl[:, None]))
        ctx.save_for_backward(gradient)
        ctx.dtype = student.dtype
        return kl

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * outputs[0][:, None]).to(ctx.dtype), None, None


def reverse_kl(student: Tensor, teacher: Tensor, columns: VocabularyColumns | None = None) -> Tensor:
    """Σ_w p_s (log p_s − log p_t) in nats, fp32 [M], of logits [M, W] at temperature 1 over the whole vocabulary.

    Only the student receives a gradient. With ``columns``, logits are this rank's columns alone; the result is whole on
    every rank and nothing of size W passes between them.
    """
    columns = columns or VocabularyColumns(0, student.shape[-1])
    return _ReverseKL.apply(student, teacher.detach(), columns)  # type: ignore[no-any-return,no-untyped-call]
