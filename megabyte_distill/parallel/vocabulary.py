"""Logits of which each tensor-parallel rank has the columns of its own token ids, and sums over all of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, slots=True)
class VocabularyColumns:
    """The token ids ``first`` … ``first + count − 1`` are this rank's; a rank of mere padding has none."""

    first: int
    count: int
    group: dist.ProcessGroup | None = None
    """None: one rank has all."""

    def total(self, x: Tensor) -> Tensor:
        """x summed over the ranks, in place; no gradient passes."""
        if self.group is not None:
            dist.all_reduce(x, group=self.group)
        return x

    def log_softmax(self, logits: Tensor) -> Tensor:
        """Log-probabilities of this rank's columns [M, count], normalised over the vocabulary; no gradient passes."""
        if self.group is None:
            return logits.log_softmax(-1)
        largest = logits.amax(-1) if self.count else logits.new_full(logits.shape[:-1], -torch.inf)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.group)
        shifted = logits - largest[:, None]
        return shifted - self.total(shifted.exp().sum(-1)).log()[:, None]

    def of_labels(self, values: Tensor, labels: Tensor) -> Tensor:
        """The value [M] of each label [M], from whichever rank has its column; no gradient passes."""
        if self.group is None:
            return values.gather(-1, labels[:, None])[:, 0]
        own = (labels >= self.first) & (labels < self.first + self.count)
        found = values.new_zeros(labels.shape)
        found[own] = values[own, labels[own] - self.first]
        return self.total(found)
