"""Stage 2's loss: cross-entropy over the 512 joint classes of the next byte and its boundary bit."""

from __future__ import annotations

import math

from torch import Tensor

from megabyte_distill.data.packing import PackedRow
from megabyte_distill.data.text_mask import text_positions
from megabyte_distill.kernels.ops import joint_cross_entropies, joint_cross_entropy


def joint_nll(logits: Tensor, row: PackedRow, *, overwrite_logits: bool = False) -> Tensor:
    """Negative log-likelihood [P] in nats, fp32, of the row's joint labels; meaningless on PAD.

    With ``overwrite_logits`` nobody else reads the logits: their gradient may take their place.
    """
    return joint_cross_entropy(logits, row.labels, overwrite_logits=overwrite_logits)


def joint_nlls(
    logits: Tensor,
    row: PackedRow,
    distribution: Tensor,
    *,
    temperature: float,
    hard_has_gradient: bool,
    overwrite_logits: bool = False,
) -> tuple[Tensor, Tensor]:
    """(:func:`joint_nll`, the cross-entropy against a distribution [P, 512] over the joint classes), each [P].

    ``temperature``: of the second, as in ``ops.joint_cross_entropies``.
    """
    return joint_cross_entropies(
        logits,
        row.labels,
        distribution,
        temperature=temperature,
        hard_has_gradient=hard_has_gradient,
        overwrite_logits=overwrite_logits,
    )


def joint_bits_pair(nll: Tensor, row: PackedRow) -> tuple[Tensor, int]:
    """(bits, bytes) of the row's text under its joint labels: their ratio is the joint bits per byte."""
    mask = text_positions(row)
    return nll.detach()[mask].double().sum() / math.log(2), int(mask.sum())
