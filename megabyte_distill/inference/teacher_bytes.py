"""The token teacher as a byte model: its exact distribution over (byte, boundary bit) pairs, stepped and scored.

The distribution is that of objectives/exact_targets.py, over the canonical tokens of what was read so far: a byte
either ends the token it belongs to or not, and a finished token goes to the teacher. Ids that cannot be text are never
drawn.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megabyte_distill.alphabet import END_OF_DOCUMENT_CLASS, JOINT_CLASSES, joint_class
from megabyte_distill.data.packing import PackedRow
from megabyte_distill.data.token_bytes import TokenBytes
from megabyte_distill.inference.branching_cache import BranchingCache
from megabyte_distill.inference.scoring import RowScore, token_row_score
from megabyte_distill.model.backbone import Backbone
from megabyte_distill.objectives.byte_tree import ByteTree
from megabyte_distill.objectives.exact_targets import TokenMass, pair_mass

_LOGIT_ENTRIES = 1 << 25
"""Logits that scoring holds at a time."""


class TeacherBytes:
    """R texts spelled byte by byte. Begins behind BOS."""

    def __init__(self, teacher: Backbone, table: TokenBytes, rows: int = 1) -> None:
        """``table``: of the teacher's vocabulary. ValueError where ranks share the vocabulary, and for no rows."""
        if teacher.columns.group is not None:
            raise ValueError("the teacher's vocabulary is cut over ranks; spell bytes without tensor parallelism")
        if rows < 1:
            raise ValueError(f"{rows} texts; expected at least one")
        self._teacher = teacher
        self._tree = ByteTree.of(table).to(teacher.device)
        self._cache = teacher.init_cache(rows)
        self._nodes = torch.zeros(rows, dtype=torch.int64, device=teacher.device)
        self.tokens: list[list[int]] = [[] for _ in range(rows)]
        """Finished tokens of each text."""
        start = torch.full((rows,), table.start_id, dtype=torch.int64, device=teacher.device)
        self._mass = self._read(start, torch.arange(rows, device=teacher.device))

    @property
    def rows(self) -> int:
        """R."""
        return self._nodes.shape[0]

    @property
    def positions(self) -> Tensor:
        """[R] tokens that each text's backbone has read, the start's counted."""
        return self._cache.lengths

    def next_pairs(self) -> Tensor:
        """[R, 512] fp64 probabilities of the next (byte, bit); class 510 is the document's end.

        ValueError where the teacher has no mass at all on a token that begins with the bytes since the last end.
        """
        masses = self._pair_masses()
        total = masses.sum(-1, keepdim=True)
        if bool((total <= 0).any()):
            raise ValueError(
                "the teacher gives no token that begins with a text's last bytes any probability; end it elsewhere"
            )
        return masses / total

    def log_chances(self, byte_ids: Tensor) -> Tensor:
        """[R, 2] fp64 log-probabilities of one byte [R] int64 with either bit; −∞ of what cannot be."""
        masses = self._pair_masses()
        joint = torch.stack([joint_class(byte_ids, torch.full_like(byte_ids, bit)) for bit in (0, 1)], dim=1)
        chances = masses.gather(1, joint).log() - masses.sum(-1, keepdim=True).log()
        return chances.masked_fill(chances.isnan(), -torch.inf)

    @torch.no_grad()
    def _pair_masses(self) -> Tensor:
        """[R, 512] fp64, not normalised."""
        every = torch.arange(self.rows, device=self._nodes.device)
        pairs = pair_mass(self._mass, every, self._nodes)
        result = torch.zeros(self.rows, JOINT_CLASSES, dtype=torch.float64, device=every.device)
        result[pairs.owner, pairs.joint] = pairs.mass
        result[:, END_OF_DOCUMENT_CLASS] = pairs.end_of_text
        return result

    @torch.no_grad()
    def advance(
        self, byte_ids: Tensor, bits: Tensor, uniform: Tensor | None = None, rows: Tensor | None = None
    ) -> None:
        """Read one byte [N] int64 and its bit [N] bool in each text, or in those of some ``rows`` [N] int64.

        Where several ids are spelled alike, ``uniform`` [N] in [0, 1) draws one by the teacher's probabilities; without
        it the likeliest is taken. ValueError for a pair that no allowed token has there.
        """
        if rows is None:
            rows = torch.arange(self.rows, device=self._nodes.device)
        nodes = self._nodes[rows]
        place = self._tree.edges_of(nodes, byte_ids)
        entry = 2 * place + nodes + (~bits).to(torch.int64)
        low, high = (self._tree.entry_place[index.clamp(min=0)] for index in (entry, entry + 1))
        wrong = ((place < 0) | (low >= high)).nonzero()[:, 0].tolist()
        if wrong:
            what = "ends" if bits[wrong[0]] else "goes on"
            raise ValueError(
                f"text {int(rows[wrong[0]])}: no token {what} with byte {int(byte_ids[wrong[0]])} after the bytes "
                "since the last end; give the bits of the teacher's own tokens"
            )
        self._nodes[rows] = torch.where(bits, 0, self._tree.edge_node[place])
        ended = bits.nonzero()[:, 0]
        if not ended.shape[0]:
            return
        draws = None if uniform is None else uniform[ended]
        chosen = _spelled_alike(self._mass, rows[ended], low[ended], high[ended], draws)
        for row, token in zip(rows[ended].tolist(), chosen.tolist(), strict=True):
            self.tokens[row].append(token)
        self._mass.put(rows[ended], self._read(chosen, rows[ended]))

    def keep(self, rows: Tensor) -> None:
        """Go on with these texts [N] int64 only, in this order; one may be taken several times."""
        if isinstance(self._cache, BranchingCache):
            self._cache.keep(rows)
        else:
            self._cache = self._cache.select(rows)
        self._nodes = self._nodes[rows]
        self.tokens = [list(self.tokens[row]) for row in rows.tolist()]
        self._mass = self._mass.select(rows)

    def branch(self) -> None:
        """From here on texts that :meth:`keep` takes several times share their keys, until :meth:`settle`."""
        self._cache = BranchingCache.of(self._cache, torch.arange(self.rows, device=self._nodes.device))

    def settle(self) -> None:
        """Each text has its own keys again."""
        if isinstance(self._cache, BranchingCache):
            self._cache = self._cache.plain(torch.arange(self.rows, device=self._nodes.device))

    @torch.no_grad()
    def _read(self, tokens: Tensor, rows: Tensor) -> TokenMass:
        hidden = self._teacher.step(self._teacher.embed(tokens), self._cache, rows)
        return TokenMass.of(self._tree, self._teacher.own_logits(hidden))


def _spelled_alike(mass: TokenMass, rows: Tensor, low: Tensor, high: Tensor, uniform: Tensor | None) -> Tensor:
    """One id [n] of the equal spellings at places low … high − 1."""
    chosen = low.clone()
    for index in (high - low > 1).nonzero()[:, 0].tolist():
        candidates = mass.probability[rows[index], int(low[index]) : int(high[index])].double()
        if uniform is None:
            chosen[index] += int(candidates.argmax())
        else:
            reached = candidates.cumsum(0) > uniform[index].to(candidates.device) * candidates.sum()
            chosen[index] += int(reached.to(torch.int64).argmax())
    return mass.tree.order[chosen]


@torch.no_grad()
def score_teacher_bytes(teacher: Backbone, tree: ByteTree, row: PackedRow) -> RowScore:
    """The teacher's exact code length of a row's text as (byte, bit) pairs, by segment.

    The token NLL, less what is gained by never drawing an id that cannot be text and by counting equal spellings
    together. ``tree``: of the teacher's vocabulary, with its columns. Collective over tensor-parallel ranks.
    """
    hidden = teacher(teacher.embed(row.tokens), row.cu_chunks)
    size = max(1, _LOGIT_ENTRIES // tree.vocab_size)  # on every rank alike
    parts = zip(torch.split(hidden, size), torch.split(row.token_labels, size), strict=True)
    return token_row_score(torch.cat([_pair_nll(teacher, tree, states, labels) for states, labels in parts]), row)


def _pair_nll(teacher: Backbone, tree: ByteTree, hidden: Tensor, labels: Tensor) -> Tensor:
    """[m] fp64 nats."""
    logits = teacher.own_logits(hidden)
    log_p = tree.columns.log_softmax(logits.float())
    spelled = tree.columns.of_labels(log_p, labels).double()
    for group in tree.alike:
        here = torch.isin(labels, torch.tensor(group, device=labels.device))
        if bool(here.any()):
            each = [tree.columns.of_labels(log_p, torch.full_like(labels, token)) for token in group]
            spelled = torch.where(here, torch.stack(each).double().logsumexp(0), spelled)
    return TokenMass.of(tree, logits).allowed().log() - spelled
