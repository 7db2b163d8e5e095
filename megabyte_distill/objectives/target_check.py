"""Exact targets of one next-token distribution against brute force: every prefix and every token of a vocabulary.

The brute force knows the table of tokens alone. It puts the beginnings of every token into a dictionary, so that a
token adds to just those prefixes q for which ``token.startswith(q)``; what the tree sorted and cut is not asked.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megabyte_distill.alphabet import BOS_BYTE, END_OF_DOCUMENT_CLASS, JOINT_CLASSES, joint_class
from megabyte_distill.data.token_bytes import TokenBytes
from megabyte_distill.objectives.byte_tree import ByteTree
from megabyte_distill.objectives.exact_targets import VANISHING, TokenMass, pair_mass

FP64_SUMS = 1e-15
"""What differences of fp64 sums of masses up to 1 leave: this much in a mass, so much / Z in a target."""
SUMS = 1e-6
"""Relative error that a prefix's sum of pairs may have, and error of a single target, beside ``FP64_SUMS``."""
RELATIVE = 1e-5
"""Relative error that a product over a token's bytes may have, beside ``FP64_SUMS``."""
LIKELY = 1e-10
"""From this probability on a product must be right to ``RELATIVE`` alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetErrors:
    """The largest errors of one distribution. Prefixes whose mass vanishes have the text's own pair for a target."""

    misplaced: int
    """Prefixes of tokens that have no node of their own in the tree, and nodes that are of no prefix."""
    sums: float
    """Relative, of a prefix's pairs added up against the brute mass of all tokens that strictly extend it, both as
    parts of the allowed mass, beyond ``FP64_SUMS``."""
    targets: float
    """Of a pair's target against the brute quotient, beyond ``FP64_SUMS``."""
    masses: float
    """Of ``sums``, absolute, against p from the logits in fp64, beyond ``RELATIVE`` of the mass."""
    products: float
    """Of the product over a token's bytes against p(token) / (mass of allowed tokens), beyond ``RELATIVE`` of it."""
    likely_products: float
    """The same, relative, for tokens of a probability of at least ``LIKELY``."""
    tokens: int
    """Tokens whose product is judged: none of their prefixes vanishes. Of the others the bytes up to there are, as
    targets."""

    @property
    def is_exact(self) -> bool:
        """Whether all of them are as small as promised; not for NaN."""
        sums, fp64 = (self.sums, self.targets), (self.masses, self.products)
        is_small = all(error < SUMS for error in sums) and all(error < FP64_SUMS for error in fp64)
        return self.misplaced == 0 and is_small and self.likely_products < RELATIVE


class BruteForce:
    """The way of every allowed token, a byte at a time, by its bytes alone.

    Q prefixes, the empty one first; A allowed tokens; S steps, one for each byte of each; U distinct pairs (prefix,
    joint class), of which the last is the end of text.
    """

    def __init__(self, table: TokenBytes) -> None:
        self.end_of_text = table.end_of_text_id
        spelled = {token: table[token] for token in range(table.vocab_size)}
        spelled = {token: text for token, text in spelled.items() if text and max(text) < BOS_BYTE}
        self.ids = torch.tensor([*spelled])
        """[A] ids of the allowed tokens, ascending."""
        prefixes: dict[bytes, int] = {}
        of_step = [
            prefixes.setdefault(text[:size], len(prefixes)) for text in spelled.values() for size in range(len(text))
        ]
        self.prefixes = [*prefixes]
        """Q."""
        lengths = torch.tensor([len(text) for text in spelled.values()])
        byte_ids = torch.frombuffer(bytearray(b"".join(spelled.values())), dtype=torch.uint8).to(torch.int64)
        ends = torch.zeros_like(byte_ids)
        ends[lengths.cumsum(0) - 1] = 1
        self.token = torch.repeat_interleave(torch.arange(self.ids.shape[0]), lengths)
        """[S] which of A a step is of."""
        self.prefix = torch.tensor(of_step)
        """[S] the prefix in front of it."""
        keys, self.pair = torch.unique(self.prefix * JOINT_CLASSES + joint_class(byte_ids, ends), return_inverse=True)
        keys = torch.cat((keys, torch.tensor([END_OF_DOCUMENT_CLASS])))
        self.pairs = torch.stack((keys // JOINT_CLASSES, keys % JOINT_CLASSES), dim=1)
        """[U, 2] prefix and joint class; ``pair`` [S] is the place of a step's own."""
        spellings: dict[bytes, int] = {}
        self._spelling = torch.tensor([spellings.setdefault(text, len(spellings)) for text in spelled.values()])

    def pair_masses(self, p: Tensor) -> Tensor:
        """[U] fp64 of probabilities [W] fp64: each token adds to the pair of each of its bytes."""
        masses = torch.zeros(self.pairs.shape[0], dtype=torch.float64).index_add_(0, self.pair, p[self.ids][self.token])
        masses[-1] = p[self.end_of_text]
        return masses

    def prefix_masses(self, p: Tensor) -> Tensor:
        """[Q] fp64: Z of each prefix."""
        extended = torch.zeros(len(self.prefixes), dtype=torch.float64)
        extended.index_add_(0, self.prefix, p[self.ids][self.token])
        extended[0] += p[self.end_of_text]
        return extended

    def token_masses(self, p: Tensor) -> Tensor:
        """[A] fp64: of all tokens that are spelled as each is."""
        return torch.zeros_like(self.ids, dtype=torch.float64).index_add_(0, self._spelling, p[self.ids])[
            self._spelling
        ]


class EveryToken:
    """The tree of a vocabulary beside brute force."""

    def __init__(self, table: TokenBytes, tree: ByteTree | None = None) -> None:
        """``tree``: what is checked, default: the table's own."""
        self.table, self.tree = table, tree or ByteTree.of(table)
        self.brute = brute = BruteForce(table)
        nodes = self.tree.entry_first.shape[0] - 1
        # each prefix walked from the root, by the bytes of the first token that has it
        walked = bytearray(b"".join(prefix + b"\0" for prefix in brute.prefixes))
        text = torch.frombuffer(walked, dtype=torch.uint8).to(torch.int64)
        ends = torch.tensor([len(prefix) + 1 for prefix in brute.prefixes]).cumsum(0) - 1
        is_end = torch.zeros(text.shape[0], dtype=torch.bool)
        is_end[ends] = True
        found = self.tree.nodes_along(text, is_end)[(ends - 1).clamp(min=0)]
        found[0] = 0
        is_found, own = found >= 0, torch.unique(found[found >= 0]).shape[0]
        self._misplaced = nodes - own + int(is_found.sum()) - own + int((~is_found).sum())
        self._node = found.clamp(min=0)
        owner = torch.repeat_interleave(torch.arange(nodes), self.tree.entry_first.diff())
        keys = owner * JOINT_CLASSES + self.tree.entry_class
        order = keys.argsort()
        wanted = self._node[brute.pairs[:-1, 0]] * JOINT_CLASSES + brute.pairs[:-1, 1]
        at = torch.searchsorted(keys[order], wanted).clamp(max=keys.shape[0] - 1)
        self._entry, self._is_there = order[at], keys[order[at]] == wanted

    @torch.no_grad()
    def errors(self, logits: Tensor) -> TargetErrors:
        """Of the next-token distribution of logits [W]."""
        brute = self.brute
        of_pair = brute.pairs[:, 0]
        nodes = torch.arange(self.tree.entry_first.shape[0] - 1)
        pairs = pair_mass(TokenMass.of(self.tree, logits[None]), torch.zeros_like(nodes), nodes)
        total = pairs.end_of_text.index_add(0, pairs.owner, pairs.mass)[self._node]
        mass = torch.where(self._is_there, pairs.mass[self._entry], 0.0)
        mass = torch.cat((mass, pairs.end_of_text[:1]))
        target = (mass / total[of_pair]).float().double()
        # sums are judged by the very numbers that are summed, products by p itself: fp32 softmax rounds both alike
        rounded, p = logits.softmax(-1, dtype=torch.float32).double(), logits.double().softmax(-1)
        summed, share = brute.prefix_masses(rounded), brute.prefix_masses(p)
        allowed = share[0]
        share = share / allowed
        quotient = brute.pair_masses(rounded) / summed[of_pair]
        has_opinion = share * allowed >= VANISHING
        wanted = brute.token_masses(p) / allowed
        steps = (mass / total[of_pair]).log()[brute.pair]
        product = torch.zeros_like(wanted).index_add_(0, brute.token, steps).exp()
        judged = torch.ones_like(wanted, dtype=torch.bool)
        judged[brute.token[~has_opinion[brute.prefix]]] = False
        miss = (product - wanted).abs()
        left = FP64_SUMS / summed
        return TargetErrors(
            misplaced=self._misplaced,
            # as parts of the root's, as targets are: torch's fp32 softmax itself sums to 1 ± 3e-5
            sums=float(((total / total[0] / (summed / summed[0]) - 1).abs() - left)[has_opinion].max()),
            targets=float(((target - quotient).abs() - left[of_pair])[has_opinion[of_pair]].max()),
            masses=float(((total / total[0] - share).abs() - RELATIVE * share).max()),
            products=float((miss - RELATIVE * wanted)[judged].max()),
            likely_products=float((miss / wanted)[judged & (wanted >= LIKELY)].max()),
            tokens=int(judged.sum()),
        )
