"""F5: cross-entropy over the joint classes, hard and soft in one pass over the logits (csrc/joint_cross_entropy.cu)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megabyte_distill.alphabet import JOINT_CLASSES
from megabyte_distill.kernels.dispatch import FusedOp
from megabyte_distill.kernels.fused.arguments import dtype_code, dtype_refusal, form_refusal, scratch
from megabyte_distill.kernels.library import library_for, prepared


def fused_joint_cross_entropy(
    logits: Tensor, labels: Tensor | None, distribution: Tensor | None, overwrite_logits: bool = False
) -> tuple[Tensor, Tensor]:
    """``ops.joint_cross_entropies``; a label that is no class has cross-entropy NaN.

    What was not asked for is empty. A compiler plans its buffers itself: compiled code does not overwrite. A leaf is
    never overwritten: its owner holds it, whatever the caller says.
    """
    may_overwrite = overwrite_logits and torch.is_grad_enabled() and not logits.is_leaf
    if may_overwrite and not torch.compiler.is_compiling():
        hard, soft = _Overwriting.apply(logits, labels, distribution)  # type: ignore[no-untyped-call]
    else:
        hard, soft, _ = torch.ops.megabyte.joint_cross_entropy(logits, labels, distribution)
    return hard, soft


def refusal(logits: Tensor, labels: Tensor | None, distribution: Tensor | None) -> str | None:
    """Why the kernel cannot take these, or None."""
    if logits.shape[1] != JOINT_CLASSES:
        return f"got {logits.shape[1]} classes, expected {JOINT_CLASSES}"
    if distribution is not None and distribution.requires_grad:
        return "got a distribution that wants a gradient, expected a constant"
    rows = logits.shape[0]
    return (
        dtype_refusal(logits)
        or form_refusal("logits", logits, (rows, JOINT_CLASSES))
        or form_refusal("labels", labels, (rows,))
        or form_refusal("distribution", distribution, (rows, JOINT_CLASSES))
    )


FUSED = FusedOp(
    run=fused_joint_cross_entropy, refusal=refusal, limits=f"fp32 or bf16 logits of {JOINT_CLASSES} classes"
)


class _Overwriting(torch.autograd.Function):
    """The registered operator, but the gradient takes the memory of the logits.

    Overwriting counts as an in-place change: whoever kept the logits for his own backward, and a second backward
    through this node, gets autograd's error instead of wrong numbers.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor | None, distribution: Tensor | None) -> tuple[Tensor, Tensor]:
        hard, soft, log_sum = torch.ops.megabyte.joint_cross_entropy(logits, labels, distribution)
        ctx.save_for_backward(logits, labels, distribution, log_sum)
        ctx.set_materialize_grads(False)
        return hard, soft

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_hard: Tensor | None, d_soft: Tensor | None) -> tuple[Tensor | None, None, None]:
        logits, labels, distribution, log_sum = ctx.saved_tensors
        if d_hard is None and d_soft is None:
            return None, None, None
        torch.ops.megabyte.joint_cross_entropy_backward_(d_hard, d_soft, logits, labels, distribution, log_sum)
        return logits.detach(), None, None


@torch.library.custom_op("megabyte::joint_cross_entropy", mutates_args=())
def _forward(logits: Tensor, labels: Tensor | None, distribution: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(cross-entropy against labels, against the distribution, log Σ exp), each [P] fp32; empty without targets."""
    hard, soft, log_sum = outputs = _outputs(logits, labels, distribution)
    library_for(logits).call(
        "joint_cross_entropy_forward",
        prepared(logits),
        *_targets(labels, distribution),
        hard,
        soft,
        log_sum,
        logits.shape[0],
        dtype_code(logits),
    )
    return outputs


@_forward.register_fake
def _(logits: Tensor, labels: Tensor | None, distribution: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(logits, labels, distribution)


def _outputs(logits: Tensor, labels: Tensor | None, distribution: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    rows = logits.shape[0]
    return (
        scratch(logits, 0 if labels is None else rows),
        scratch(logits, 0 if distribution is None else rows),
        scratch(logits, rows),
    )


def _targets(labels: Tensor | None, distribution: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    return (
        None if labels is None else prepared(labels.to(torch.int64)),
        None if distribution is None else prepared(distribution.to(torch.float32)),
    )


@torch.library.custom_op("megabyte::joint_cross_entropy_backward", mutates_args=())
def _backward(
    d_hard: Tensor | None,
    d_soft: Tensor | None,
    logits: Tensor,
    labels: Tensor | None,
    distribution: Tensor | None,
    log_sum: Tensor,
) -> Tensor:
    """Gradient of the logits [P, 512]."""
    d_logits = logits.new_empty(logits.shape)
    _differentiate_into(d_logits, d_hard, d_soft, prepared(logits), labels, distribution, log_sum)
    return d_logits


@_backward.register_fake
def _(
    d_hard: Tensor | None,
    d_soft: Tensor | None,
    logits: Tensor,
    labels: Tensor | None,
    distribution: Tensor | None,
    log_sum: Tensor,
) -> Tensor:
    return logits.new_empty(logits.shape)


@torch.library.custom_op("megabyte::joint_cross_entropy_backward_", mutates_args=("logits",))
def _backward_in_place(
    d_hard: Tensor | None,
    d_soft: Tensor | None,
    logits: Tensor,
    labels: Tensor | None,
    distribution: Tensor | None,
    log_sum: Tensor,
) -> None:
    """Puts the gradient of the logits [P, 512] where they are."""
    own = prepared(logits)
    _differentiate_into(own, d_hard, d_soft, own, labels, distribution, log_sum)
    if own is not logits:
        logits.copy_(own)


@_backward_in_place.register_fake
def _(
    d_hard: Tensor | None,
    d_soft: Tensor | None,
    logits: Tensor,
    labels: Tensor | None,
    distribution: Tensor | None,
    log_sum: Tensor,
) -> None:
    return None


def _differentiate_into(
    to: Tensor,
    d_hard: Tensor | None,
    d_soft: Tensor | None,
    logits: Tensor,
    labels: Tensor | None,
    distribution: Tensor | None,
    log_sum: Tensor,
) -> None:
    # targets without a gradient drop out; a gradient of labels with none to give is a call that never happens
    labels, distribution = (None if d_hard is None else labels), (None if d_soft is None else distribution)
    library_for(logits).call(
        "joint_cross_entropy_backward",
        logits,
        *_targets(labels, distribution),
        log_sum,
        None if d_hard is None else prepared(d_hard),
        None if d_soft is None else prepared(d_soft),
        to,
        logits.shape[0],
        dtype_code(logits),
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs, output[2])
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: Any, d_hard: Tensor | None, d_soft: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, None, None]:
    if d_hard is None and d_soft is None:
        return None, None, None
    return torch.ops.megabyte.joint_cross_entropy_backward(d_hard, d_soft, *ctx.saved_tensors), None, None


_forward.register_autograd(_differentiate, setup_context=_keep)
