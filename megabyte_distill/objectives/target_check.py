"""Exact targets of one next-token distribution against brute force: every prefix and every token of a vocabulary."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megabyte_distill.alphabet import JOINT_CLASSES, joint_class
from megabyte_distill.data.token_bytes import TokenBytes
from megabyte_distill.objectives.byte_tree import ByteTree
from megabyte_distill.objectives.exact_targets import VANISHING, TokenMass, pair_mass

RELATIVE = 1e-5
"""Error that a product over a token's bytes may have, beside what fp64 sums of masses up to 1 leave."""
LIKELY = 1e-10
"""From this probability on a product must be right to ``RELATIVE`` alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetErrors:
    """The largest errors of one distribution."""

    sums: float
    """Of Σ targets − 1, in fp32, over prefixes whose mass does not vanish."""
    masses: float
    """Of a prefix's share of the allowed mass, beyond ``RELATIVE`` of it."""
    products: float
    """Of the product over a token's bytes against p(token) / (mass of allowed tokens), beyond ``RELATIVE`` of it."""
    likely_products: float
    """The same, relative, for tokens of a probability of at least ``LIKELY``."""
    tokens: int
    """Tokens judged: none of their prefixes vanishes."""

    @property
    def is_exact(self) -> bool:
        """Whether all of them are as small as promised."""
        largest = max(self.masses, self.products)
        return self.sums < 1e-6 and largest < 1e-15 and self.likely_products < RELATIVE


class EveryToken:
    """The way of every allowed token through the tree."""

    def __init__(self, table: TokenBytes) -> None:
        self.table, self.tree = table, ByteTree.of(table)
        tree = self.tree
        self.ids = tree.order[: tree.allowed]
        """[A] ids of the allowed tokens."""
        lengths = torch.from_numpy(table.lengths.astype(np.int64))[self.ids]
        self._token = torch.repeat_interleave(torch.arange(self.ids.shape[0]), lengths)
        text = torch.from_numpy(table.concatenate(self.ids.numpy()).astype(np.int64))
        last = torch.zeros(text.shape[0], dtype=torch.bool)
        last[lengths.cumsum(0) - 1] = True
        behind = tree.nodes_along(text, last)  # the tokens one after another
        self._node = torch.cat((torch.zeros(1, dtype=torch.int64), behind[:-1]))
        joint = joint_class(text, last.to(torch.int64))
        nodes = torch.arange(tree.entry_first.shape[0] - 1)
        keys = torch.repeat_interleave(nodes, tree.entry_first[1:] - tree.entry_first[:-1]) * JOINT_CLASSES
        keys += tree.entry_class
        order = keys.argsort()
        self._entry = order[torch.searchsorted(keys[order], self._node * JOINT_CLASSES + joint)]
        numbers: dict[bytes, int] = {}
        self._spelling = torch.tensor([numbers.setdefault(table[token], len(numbers)) for token in self.ids.tolist()])

    @torch.no_grad()
    def errors(self, logits: Tensor) -> TargetErrors:
        """Of the next-token distribution of logits [W]."""
        nodes = torch.arange(self.tree.entry_first.shape[0] - 1)
        pairs = pair_mass(TokenMass.of(self.tree, logits[None]), torch.zeros_like(nodes), nodes)
        total = pairs.end_of_text.index_add(0, pairs.owner, pairs.mass)
        parts = (pairs.mass / total[pairs.owner]).float().double()
        sums = (pairs.end_of_text / total).index_add(0, pairs.owner, parts)
        p = logits.double().softmax(-1)
        end_of_text = p[self.table.end_of_text_id]
        allowed = p[self.ids].sum() + end_of_text
        # the definition: each token adds to all of its prefixes, and to its spelling
        share = torch.zeros_like(total).index_add_(0, self._node, p[self.ids][self._token])
        share[0] += end_of_text
        share /= allowed
        wanted = torch.zeros_like(p).index_add_(0, self._spelling, p[self.ids])[self._spelling] / allowed
        steps = (pairs.mass[self._entry] / total[self._node]).log()
        product = torch.zeros_like(wanted).index_add_(0, self._token, steps).exp()
        smallest = torch.ones_like(wanted).scatter_reduce_(0, self._token, total[self._node], "amin")
        judged = smallest >= VANISHING
        miss = (product - wanted).abs()
        return TargetErrors(
            sums=float((sums[total >= VANISHING] - 1).abs().max()),
            # against the root's, as in the targets: torch's fp32 softmax itself sums to 1 ± 3e-5
            masses=float(((total / total[0] - share).abs() - RELATIVE * share).max()),
            products=float((miss - RELATIVE * wanted)[judged].max()),
            likely_products=float((miss / wanted)[judged & (wanted >= LIKELY)].max()),
            tokens=int(judged.sum()),
        )
