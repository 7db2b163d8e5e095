"""The teacher's exact distribution over the next byte and its boundary bit, from its next-token distribution.

With q the bytes since the last token end and p the teacher's next-token distribution:

    Z           = mass of allowed tokens that strictly extend q (q empty: all allowed tokens and the end of text)
    P(b, ends)  = mass of tokens that are just q·b / Z          P(b, goes on) = mass of tokens that extend q·b / Z

The product over a token's bytes is the teacher's p(token) / (mass of allowed tokens). Under tensor parallelism each
rank sums its own ids; what passes between ranks are the sums that the bytes need, never a row of logits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megabyte_distill.alphabet import END_OF_DOCUMENT_CLASS, JOINT_CLASSES
from megabyte_distill.objectives.byte_tree import ByteTree

VANISHING = 1e-12
"""Where the allowed mass is below it the teacher has no opinion: the hard label stands."""

_SPAN = 8
"""Neighbouring tokens whose masses are added up at once; a range that begins or ends inside adds singles."""
_SINGLES_UP_TO = 1 << 14
"""Of so few ids each is its own span: cumulative sums over them cost less than the singles."""
_CPU_BLOCK_ENTRIES = 1 << 22
"""Logits of all ranks worked on at a time on a CPU, where what fits the cache is fast."""
_BLOCK_ENTRIES = 1 << 27
"""The same on a GPU, where few large operations are."""


class ExactTargets(NamedTuple):
    """Targets of the bytes of a row."""

    distribution: Tensor
    """[P, 512] fp32, sums to 1; zero where not wanted."""
    replaced: Tensor
    """Number of bytes whose hard label stands instead."""
    excluded: Tensor
    """Sum over the chunks that wanted bytes read of the teacher's mass on ids that are neither allowed nor the end of
    text, fp64."""
    chunks: Tensor
    """Number of those chunks."""


@dataclass(frozen=True, slots=True)
class TokenMass:
    """Probabilities of this rank's token ids in the tree's order, ready to be summed over ranges of places.

    A range is the singles behind its beginning, whole spans, and the singles before its end. No sum is taken that one
    token could dominate and another be the difference of, but for whole spans, in fp64: fp32 differences err by 0.03
    nats at W = 4096.
    """

    tree: ByteTree
    probability: Tensor
    """[M, C] fp32, normalised over the rank's own ids."""
    before: Tensor
    """[M, C / span + 1] fp64: mass before each whole span."""
    span: int
    share: Tensor
    """[M] fp64: the rank's part of the whole distribution."""

    @classmethod
    def of(cls, tree: ByteTree, logits: Tensor) -> TokenMass:
        """Of this rank's columns of the logits [M, C]. Collective over the tensor-parallel ranks."""
        own = logits.index_select(1, tree.order)
        if not own.shape[1]:  # a rank of mere padding
            own = own.new_zeros(own.shape[0], 1)
        probability = own.softmax(-1, dtype=torch.float32)
        rows, columns = probability.shape
        span = 1 if columns <= _SINGLES_UP_TO else _SPAN
        spans = columns // span
        sums = probability
        if span > 1:
            sums = probability[:, : spans * span].view(rows, spans, span).sum(-1)
        before = torch.empty(rows, spans + 1, dtype=torch.float64, device=own.device)
        before[:, 0] = 0.0
        torch.cumsum(sums, -1, dtype=torch.float64, out=before[:, 1:])
        return cls(tree, probability, before, span, _own_share(tree, own, probability))

    def pieces(self, rows: Tensor, places: Tensor) -> Tensor:
        """[n] fp64: the rank's mass of the tokens from each place [n] to the next one, in the row [n] of the former.

        Undefined for the last place and where the next place is in another row or before it. Times :attr:`share` a mass
        is a part of the whole distribution.
        """
        at = rows * self.before.shape[1]
        before = self.before.view(-1)
        if self.span == 1:
            until = before[at + places]
            return (until.roll(-1) - until).clamp_(min=0.0)
        first = places // self.span
        offset = places - first * self.span
        last, end = first.roll(-1), offset.roll(-1)
        flat = self.probability.view(-1)
        within = torch.arange(self.span, device=places.device)
        index = (rows * self.probability.shape[1] + first * self.span)[:, None] + within
        singles = flat[index.clamp_(max=flat.shape[0] - 1)]  # behind the last token nothing is wanted
        is_one_span = first == last
        stop = torch.where(is_one_span, end, self.span)
        begins = (singles * ((within >= offset[:, None]) & (within < stop[:, None]))).sum(-1)
        ends = (singles * (within < offset[:, None])).sum(-1).roll(-1).masked_fill_(is_one_span, 0.0)
        whole = before[at + last] - before[at + torch.minimum(first + 1, last)]
        return whole.clamp_(min=0.0) + begins + ends

    def select(self, rows: Tensor) -> TokenMass:
        """A copy of some rows [K] int64."""
        return replace(self, probability=self.probability[rows], before=self.before[rows], share=self.share[rows])

    def put(self, rows: Tensor, other: TokenMass) -> None:
        """Overwrite the rows [K] int64 with those of ``other`` in order, in place."""
        self.probability[rows], self.before[rows], self.share[rows] = other.probability, other.before, other.share

    def allowed(self) -> Tensor:
        """[M] fp64: mass of all allowed tokens and the end of text. Collective as :meth:`of`."""
        rows = torch.arange(self.share.shape[0], device=self.share.device)
        edges = torch.tensor([0, self.tree.allowed], device=rows.device).repeat(rows.shape[0])
        text = self.pieces(rows.repeat_interleave(2), edges)[::2] * self.share
        return self.tree.columns.total(text + self.end_of_text)

    @property
    def excluded(self) -> Tensor:
        """[M] fp64: this rank's mass of ids that are neither allowed nor the end of text."""
        first = self.tree.allowed + int(self.tree.has_end_of_text)
        return self.probability[:, first:].sum(-1, dtype=torch.float64) * self.share

    @property
    def end_of_text(self) -> Tensor:
        """[M] fp64: the mass of the end of text, where it is this rank's."""
        if not self.tree.has_end_of_text:
            return torch.zeros_like(self.share)
        return self.probability[:, self.tree.allowed].double() * self.share


def _own_share(tree: ByteTree, own: Tensor, probability: Tensor) -> Tensor:
    group = tree.columns.group
    if group is None:
        return torch.ones(own.shape[0], dtype=torch.float64, device=own.device)
    highest = own.max(-1)
    # log Σ exp of the own logits, from the largest one and its part of it
    part = probability.gather(1, highest.indices[:, None])[:, 0]
    log_sum = highest.values.double() - part.double().log()
    if not tree.columns.count:
        log_sum.fill_(-torch.inf)
    largest = log_sum.clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    relative = (log_sum - largest).exp()
    return relative / tree.columns.total(relative.clone())


class PairMass(NamedTuple):
    """Of n bytes, what may follow each; one entry an edge and bit."""

    owner: Tensor
    """[E] int64, which byte an entry is about; ascending."""
    joint: Tensor
    """[E] int64, the joint class."""
    mass: Tensor
    """[E] fp64, the teacher's mass of tokens that go that way; 0 in the unused entry behind each byte's last."""
    end_of_text: Tensor
    """[n] fp64, 0 inside a token."""


def pair_mass(mass: TokenMass, rows: Tensor, nodes: Tensor) -> PairMass:
    """Of n bytes, each with its row [n] of the token masses and its node [n]. Collective as :meth:`TokenMass.of`."""
    tree = mass.tree
    first = tree.entry_first[nodes]
    count = tree.entry_first[nodes + 1] - first
    owner = torch.repeat_interleave(torch.arange(nodes.shape[0], device=nodes.device), count)
    end = count.cumsum(0)
    entry = torch.arange(owner.shape[0], device=nodes.device) + (first - end + count)[owner]
    row = rows[owner]
    pieces = mass.pieces(row, tree.entry_place[entry])
    pieces[end - 1] = 0.0
    end_of_text = torch.where(nodes == 0, mass.end_of_text[rows], 0.0)
    if tree.columns.group is not None:
        # differences are made: from here on fp32 is exact enough
        together = torch.cat((pieces * mass.share[row], end_of_text)).float()
        pieces, end_of_text = torch.split(tree.columns.total(together).double(), [owner.shape[0], nodes.shape[0]])
    return PairMass(owner, tree.entry_class[entry], pieces, end_of_text)


@torch.no_grad()
def exact_targets(
    tree: ByteTree,
    states: Tensor,
    *,
    head: Callable[[Tensor], Tensor] | None = None,
    byte_ids: Tensor,
    bits: Tensor,
    labels: Tensor,
    wanted: Tensor,
) -> ExactTargets:
    """Targets for each byte of a packed row under its gold boundaries. Collective over the tensor-parallel ranks.

    Args:
        tree: of the teacher's vocabulary, with this rank's columns.
        states: [M, E] of the teacher on the gold tokens: row j holds its belief about what follows chunk j.
        head: this rank's columns of the logits [m, C] of states [m, E]; None where ``states`` are those already.
        byte_ids, bits, labels: [P] of the row.
        wanted: [P] bool, bytes that get a target.
    """
    place = wanted.nonzero()[:, 0]
    chunk = (bits.to(torch.int64).cumsum(0) - 1)[place]
    node = tree.nodes_along(byte_ids, bits)[place]
    distribution = torch.zeros(byte_ids.shape[0], JOINT_CLASSES, dtype=torch.float32, device=place.device)
    excluded = torch.zeros((), dtype=torch.float64, device=place.device)
    chunks = int(chunk[-1]) + 1 if chunk.shape[0] else 0
    # padding between rows that are packed together is nobody's
    is_read = torch.zeros(chunks, dtype=torch.bool, device=place.device)
    is_read[chunk] = True
    entries = _CPU_BLOCK_ENTRIES if states.device.type == "cpu" else _BLOCK_ENTRIES
    rows = max(1, entries // tree.vocab_size)  # on every rank alike: blocks are collective
    starts = list(range(0, chunks, rows))
    cuts = torch.searchsorted(chunk, torch.tensor([*starts, chunks], device=chunk.device)).tolist()
    for first, low, high in zip(starts, cuts, cuts[1:], strict=False):
        here = slice(low, high)
        part = states[first : min(first + rows, chunks)]
        mass = TokenMass.of(tree, part if head is None else head(part))
        excluded += mass.excluded[is_read[first : first + rows]].sum()
        pairs = pair_mass(mass, chunk[here] - first, node[here].clamp(min=0))
        at = place[here]
        distribution[at[pairs.owner], pairs.joint] = pairs.mass.float()
        distribution[at, END_OF_DOCUMENT_CLASS] = pairs.end_of_text.float()
    total = distribution.sum(-1)
    scale = torch.where(total < VANISHING, 0.0, 1.0 / total)
    scale[place[node < 0]] = 0.0
    distribution *= scale[:, None]
    vanishing = scale[place] == 0
    distribution[place, labels[place]] += vanishing.float()
    return ExactTargets(distribution, vanishing.sum(), tree.columns.total(excluded), is_read.sum())
