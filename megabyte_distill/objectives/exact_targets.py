"""The teacher's exact distribution over the next byte and its boundary bit, from its next-token distribution.

With q the bytes since the last token end and p the teacher's next-token distribution (RECIPE section 5.1):

    Z           = mass of allowed tokens that strictly extend q (q empty: all allowed tokens and the end of text)
    P(b, ends)  = mass of tokens that are just q·b / Z          P(b, goes on) = mass of tokens that extend q·b / Z

The product over a token's bytes is the teacher's p(token) / (mass of allowed tokens).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megabyte_distill.alphabet import END_OF_DOCUMENT_CLASS, JOINT_CLASSES
from megabyte_distill.objectives.byte_tree import ByteTree

VANISHING = 1e-12
"""Where the allowed mass is below it the teacher has no opinion: the hard label stands."""

_MASS_ENTRIES = 1 << 24
"""Of the cumulative mass that is in memory at a time: 128 MiB."""


class ExactTargets(NamedTuple):
    """Targets of the bytes of a row."""

    distribution: Tensor
    """[P, 512] fp32, sums to 1; zero where not wanted."""
    replaced: Tensor
    """Number of bytes whose hard label stands instead."""


@torch.no_grad()
def exact_targets(
    tree: ByteTree, logits: Tensor, *, byte_ids: Tensor, bits: Tensor, labels: Tensor, wanted: Tensor
) -> ExactTargets:
    """Targets for each byte of a packed row under its gold boundaries.

    Args:
        tree: of the teacher's vocabulary.
        logits: [M, W] of the teacher on the gold tokens: row j is its belief about what follows chunk j.
        byte_ids, bits, labels: [P] of the row.
        wanted: [P] bool, bytes that get a target.
    """
    place = wanted.nonzero()[:, 0]
    chunk = (bits.to(torch.int64).cumsum(0) - 1)[place]
    node = tree.nodes_along(byte_ids, bits)[place]
    distribution = torch.zeros(byte_ids.shape[0], JOINT_CLASSES, dtype=torch.float32, device=place.device)
    replaced = torch.zeros((), dtype=torch.int64, device=place.device)
    rows = max(1, _MASS_ENTRIES // logits.shape[1])
    for first in range(0, logits.shape[0], rows):
        here = ((chunk >= first) & (chunk < first + rows)).nonzero()[:, 0]
        compact, vanishing = _of_block(tree, logits[first : first + rows], chunk[here] - first, node[here])
        hard = torch.nn.functional.one_hot(labels[place[here]], JOINT_CLASSES).float()
        distribution[place[here]] = torch.where(vanishing[:, None], hard, compact)
        replaced += vanishing.sum()
    return ExactTargets(distribution, replaced)


def _of_block(tree: ByteTree, logits: Tensor, chunk: Tensor, node: Tensor) -> tuple[Tensor, Tensor]:
    """Targets [n, 512] of n bytes, each with its row of ``logits`` and its node; and where there are none, [n] bool."""
    probability = logits.float().softmax(-1)
    end_of_text = torch.where(node == 0, probability[chunk, tree.end_of_text_id].double(), 0.0)
    mass = _cumulative_mass(probability.index_select(1, tree.order))
    unknown, node = node < 0, node.clamp(min=0)
    total = mass[chunk, tree.node_high[node]] - mass[chunk, tree.node_low[node]] + end_of_text
    vanishing = unknown | (total < VANISHING)
    scale = torch.where(vanishing, 1.0, 1.0 / total)
    # one entry an edge of each byte's node
    first, count = tree.node_first[node], tree.node_first[node + 1] - tree.node_first[node]
    owner = torch.repeat_interleave(torch.arange(node.shape[0], device=node.device), count)
    edge = torch.arange(owner.shape[0], device=node.device) - (count.cumsum(0) - count - first)[owner]
    low, middle, high = (mass[chunk[owner], part[edge]] for part in (tree.edge_low, tree.edge_middle, tree.edge_high))
    byte, scale_of = tree.edge_key[edge] & 255, scale[owner]
    target = torch.zeros(node.shape[0], JOINT_CLASSES, dtype=torch.float32, device=node.device)
    target[owner, byte] = ((high - middle) * scale_of).float()
    target[owner, byte + 256] = ((middle - low) * scale_of).float()
    target[:, END_OF_DOCUMENT_CLASS] += (end_of_text * scale).float()
    return target, vanishing


def _cumulative_mass(probability: Tensor) -> Tensor:
    """[M, A + 1] fp64: mass of the first so many tokens of [M, A].

    The sums are in fp64, where differences of neighbours give the fp32 terms back; fp32 sums err by 0.03 nats at
    W = 4096.
    """
    mass = probability.new_zeros(probability.shape[0], probability.shape[1] + 1, dtype=torch.float64)
    torch.cumsum(probability, -1, dtype=torch.float64, out=mass[:, 1:])
    return mass
