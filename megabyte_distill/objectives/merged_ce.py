"""Stage 2's loss where a chunk is several teacher tokens: the teacher's bytes, and the text's own bit.

The teacher says how likely each next byte is, but not where a merged chunk ends: that is known for the byte that the
text has, and for no other. With x the text's next byte, β its bit, m the teacher's bytes (its pairs, the bit summed
out) and q the student's pairs:

    −Σ_b m(b) log Σ_bit q(b, bit)  −  log q(β | x)

Where m is sure of x this is the joint NLL. m knows the tokens so far, and the student's bits are a function of them: of
all texts that look the same to the student, the mean of m is how likely each byte is, and the loss is least at the true
pairs. One bit is no such function, that of a text's last byte where the rule would have merged its token:
:func:`given_own_bits` conditions m on it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megabyte_distill.alphabet import BYTE_VOCAB, END_OF_DOCUMENT_CLASS
from megabyte_distill.data.packing import PackedRow
from megabyte_distill.kernels.ops import accumulation_dtype

_NOTHING_LEFT = 1e-6
"""Below it the rest of a distribution is rounding."""


def given_own_bits(distribution: Tensor, row: PackedRow) -> Tensor:
    """The teacher's pairs [P, 512] of a merged row as the student's own bits leave them, in place.

    At a token end that was merged the text goes on: the end of text is taken out. At an end that stays only because its
    segment ends there, which the student sees, the text's own byte is all there is.
    """
    assert row.token_bits is not None and row.forced_ends is not None
    goes_on = row.token_bits & ~row.bits
    distribution[:, END_OF_DOCUMENT_CLASS].masked_fill_(goes_on, 0.0)
    rest = distribution.sum(-1)
    distribution.mul_(torch.where(goes_on, 1.0 / rest.clamp(min=_NOTHING_LEFT), 1.0)[:, None])
    is_hard = row.forced_ends | (goes_on & (rest < _NOTHING_LEFT))
    distribution.masked_fill_(is_hard[:, None], 0.0)
    return distribution.scatter_add_(1, row.labels[:, None], is_hard[:, None].to(distribution.dtype))


class _BytesAndBit(torch.autograd.Function):
    """The loss with its gradient in closed form; keeps one tensor [P, 512] for the backward."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, distribution: Tensor) -> Tensor:
        wide = logits.to(accumulation_dtype(logits.dtype))
        pairs = wide.view(-1, 2, BYTE_VOCAB)
        of_byte = torch.logaddexp(pairs[:, 0], pairs[:, 1])
        log_sum = of_byte.logsumexp(-1)
        target = distribution.to(wide.dtype).view(-1, 2, BYTE_VOCAB).sum(1)
        total = target.sum(-1)
        byte, label = (labels % BYTE_VOCAB)[:, None], labels[:, None]
        bit_nll = (of_byte.gather(1, byte) - wide.gather(1, label))[:, 0]
        loss = total * log_sum - (target * of_byte).sum(-1) + bit_nll
        # d log q(bit | x) has the same form as a target of −1 on x beside the label's own class
        target.scatter_add_(1, byte, torch.full_like(target[:, :1], -1.0))
        share = total[:, None] * (of_byte - log_sum[:, None]).exp() - target
        gradient = ((pairs - of_byte[:, None]).exp() * share[:, None]).view_as(wide)
        gradient.scatter_add_(1, label, torch.full_like(target[:, :1], -1.0))
        ctx.save_for_backward(gradient)
        ctx.dtype = logits.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * outer[:, None]).to(ctx.dtype), None, None


def bytes_and_bit_nll(logits: Tensor, labels: Tensor, distribution: Tensor) -> Tensor:
    """Nats [P] of each byte, fp32 (fp64 for fp64 logits): the loss above.

    Args:
        logits: [P, 512].
        labels: [P] int64 joint class of the next byte and its merged bit.
        distribution: [P, 512] the teacher's exact pairs under its own tokens, :func:`given_own_bits`; of a bit's two
            classes only the sum counts.
    """
    result: Tensor = _BytesAndBit.apply(logits, labels, distribution)  # type: ignore[no-untyped-call]
    return result
