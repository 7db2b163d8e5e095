"""Exact targets cut down to their likeliest pairs, as they are stored, and made whole again."""

from __future__ import annotations

import torch
from torch import Tensor

from megabyte_distill.alphabet import END_OF_DOCUMENT_CLASS, JOINT_CLASSES
from megabyte_distill.data.packing import PackedRow
from megabyte_distill.data.stored_targets import StoredTargets
from megabyte_distill.objectives.byte_tree import ByteTree


@torch.no_grad()
def truncated(distribution: Tensor, top_k: int) -> StoredTargets:
    """The ``top_k`` likeliest of each row of a distribution [P, 512] in fp16; what is 0 in fp16 is left out as well."""
    largest = distribution.topk(top_k, dim=-1)
    stored = largest.values.half()
    kept = stored > 0
    rest = distribution.scatter(1, torch.where(kept, largest.indices, largest.indices[:, :1]), 0.0)
    return StoredTargets(
        counts=kept.sum(-1).to(torch.int32),
        tail=rest.sum(-1).half(),
        classes=largest.indices[kept].to(torch.int16),
        probabilities=stored[kept],
    )


@torch.no_grad()
def restored(tree: ByteTree, row: PackedRow) -> Tensor:
    """The distribution [P, 512] fp32 of a row's stored targets; zero where there is none.

    The mass that was left out goes in equal parts to the pairs that tokens of the vocabulary allow there and that are
    not stored. ``tree``: of the whole vocabulary. ValueError for a row without stored targets.
    """
    if row.stored is None:
        raise ValueError("the row has no stored targets; the data set's rows must come with them")
    stored = row.stored
    size = row.byte_ids.shape[0]
    counts = stored.counts.to(torch.int64)
    owner = torch.repeat_interleave(torch.arange(size, device=counts.device), counts)
    distribution = torch.zeros(size, JOINT_CLASSES, dtype=torch.float32, device=counts.device)
    distribution[owner, stored.classes.to(torch.int64)] = stored.probabilities.float()
    _spread_tail(tree, row, stored, distribution)
    total = distribution.sum(-1, keepdim=True)
    return distribution.div_(total.masked_fill_(total == 0, 1.0))


def _spread_tail(tree: ByteTree, row: PackedRow, stored: StoredTargets, distribution: Tensor) -> None:
    cut = (stored.tail > 0).nonzero()[:, 0]
    node = tree.nodes_along(row.byte_ids, row.token_ends)[cut]
    cut, node = cut[node >= 0], node[node >= 0]
    first = tree.entry_first[node]
    count = tree.entry_first[node + 1] - first
    owner = torch.repeat_interleave(torch.arange(cut.shape[0], device=cut.device), count)
    entry = torch.arange(owner.shape[0], device=cut.device) + (first - count.cumsum(0) + count)[owner]
    # behind a node's last entry the places begin anew: nothing is between them
    is_possible = tree.entry_place[(entry + 1).clamp(max=tree.entry_place.shape[0] - 1)] > tree.entry_place[entry]
    is_possible &= entry + 1 < tree.entry_first[node + 1][owner]
    possible = torch.zeros(cut.shape[0], JOINT_CLASSES, dtype=torch.bool, device=cut.device)
    possible[owner[is_possible], tree.entry_class[entry[is_possible]]] = True
    possible[:, END_OF_DOCUMENT_CLASS] = node == 0
    possible &= distribution[cut] == 0
    number = possible.sum(-1)
    part = stored.tail[cut].float() / number.clamp(min=1)
    distribution[cut] += torch.where(possible, part[:, None], 0.0)
