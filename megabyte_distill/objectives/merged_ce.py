"""Stage 2's loss where a chunk is several teacher tokens: the teacher's bytes, and the text's own bit.

The teacher says how likely each next byte is, but not where a merged chunk ends: that is known for the byte that the
text has, and for no other. With x the text's next byte, β its bit, m the teacher's bytes (its pairs, the bit summed
out) and q the student's pairs:

    −Σ_b m(b) log Σ_bit q(b, bit)  −  log q(β | x)

Where m is sure of x this is the joint NLL. In the mean over text that the teacher's own bytes are drawn from, it is the
cross-entropy against pairs whose byte is the teacher's and whose bit is the merging's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megabyte_distill.alphabet import BYTE_VOCAB
from megabyte_distill.kernels.ops import accumulation_dtype


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
        distribution: [P, 512] the teacher's exact pairs under its own tokens; of a bit's two classes only the sum
            counts.
    """
    result: Tensor = _BytesAndBit.apply(logits, labels, distribution)  # type: ignore[no-untyped-call]
    return result
