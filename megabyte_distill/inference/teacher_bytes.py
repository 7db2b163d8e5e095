"""The token teacher as a byte model: its exact distribution over (byte, boundary bit) pairs, sampled and scored.

The distribution is that of objectives/exact_targets.py, over the canonical tokens of what was read so far: a byte
either ends the token it belongs to or not, and a finished token goes to the teacher. Ids that cannot be text are never
drawn.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megabyte_distill.alphabet import BOS_BYTE, END_OF_DOCUMENT_CLASS, JOINT_CLASSES, split_class
from megabyte_distill.data.packing import PackedRow
from megabyte_distill.data.token_bytes import TokenBytes
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

    @torch.no_grad()
    def next_pairs(self) -> Tensor:
        """[R, 512] fp64 probabilities of the next (byte, bit); class 510 is the document's end.

        ValueError where the teacher has no mass at all on a token that begins with the bytes since the last end.
        """
        every = torch.arange(self.rows, device=self._nodes.device)
        pairs = pair_mass(self._mass, every, self._nodes)
        result = torch.zeros(self.rows, JOINT_CLASSES, dtype=torch.float64, device=every.device)
        result[pairs.owner, pairs.joint] = pairs.mass
        result[:, END_OF_DOCUMENT_CLASS] = pairs.end_of_text
        total = result.sum(-1, keepdim=True)
        without = (total[:, 0] <= 0).nonzero()[:, 0].tolist()
        if without:
            raise ValueError(
                f"text {without[0]}: the teacher gives no token that begins with its last bytes any probability"
            )
        return result / total

    @torch.no_grad()
    def advance(self, byte_ids: Tensor, bits: Tensor, uniform: Tensor | None = None) -> None:
        """Read one byte [R] int64 and its bit [R] bool in each text.

        Where several ids are spelled alike, ``uniform`` [R] in [0, 1) draws one by the teacher's probabilities; without
        it the likeliest is taken. ValueError for a pair that no allowed token has there.
        """
        place = self._tree.edges_of(self._nodes, byte_ids)
        entry = 2 * place + self._nodes + (~bits).to(torch.int64)
        low, high = (self._tree.entry_place[index.clamp(min=0)] for index in (entry, entry + 1))
        wrong = ((place < 0) | (low >= high)).nonzero()[:, 0].tolist()
        if wrong:
            what = "ends" if bits[wrong[0]] else "goes on"
            raise ValueError(
                f"text {wrong[0]}: no token {what} with byte {int(byte_ids[wrong[0]])} after the bytes since the last "
                "end; give the bits of the teacher's own tokens"
            )
        self._nodes = torch.where(bits, 0, self._tree.edge_node[place])
        ended = bits.nonzero()[:, 0]
        if not ended.shape[0]:
            return
        draws = None if uniform is None else uniform[ended]
        chosen = _spelled_alike(self._mass, ended, low[ended], high[ended], draws)
        for row, token in zip(ended.tolist(), chosen.tolist(), strict=True):
            self.tokens[row].append(token)
        self._mass.put(ended, self._read(chosen, ended))

    def keep(self, rows: Tensor) -> None:
        """Go on with these texts [N] int64 only, in this order."""
        self._cache = self._cache.select(rows)
        self._nodes = self._nodes[rows]
        self.tokens = [self.tokens[row] for row in rows.tolist()]
        self._mass = self._mass.select(rows)

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Spelled:
    """A text drawn from the teacher."""

    byte_ids: bytes
    """Not always valid UTF-8, and perhaps cut within a token."""
    bits: tuple[bool, ...]
    """Where tokens end."""
    tokens: tuple[int, ...]
    """The finished ones."""
    ended: bool
    """True where the teacher ended the document, False where ``max_new_bytes`` did."""


def sample_texts(
    teacher: Backbone, table: TokenBytes, *, rows: int = 1, max_new_bytes: int = 256, seed: int = 0
) -> list[Spelled]:
    """Texts from the start of a document, drawn pair by pair; their tokens are samples of the teacher's.

    Errors as :class:`TeacherBytes`.
    """
    generator = torch.Generator().manual_seed(seed)
    running = TeacherBytes(teacher, table, rows)
    device = teacher.device
    alive = torch.arange(rows, device=device)
    bytes_of, bits_of = [bytearray() for _ in range(rows)], [list[bool]() for _ in range(rows)]
    tokens_of: list[list[int]] = list(running.tokens)
    ended = [False] * rows
    for _ in range(max_new_bytes):
        draws = torch.rand(2, rows, dtype=torch.float64, generator=generator).to(device)[:, alive]
        cumulative = running.next_pairs().cumsum(-1)
        # what rounding leaves above the last class belongs to the last one that is possible
        target = torch.minimum(draws[0] * cumulative[:, -1], cumulative[:, -1] * (1 - 1e-15))
        joint = torch.searchsorted(cumulative, target[:, None], right=True)[:, 0]
        byte_ids, bits = split_class(joint)
        goes_on = (byte_ids != BOS_BYTE).nonzero()[:, 0]
        for row in alive[byte_ids == BOS_BYTE].tolist():
            ended[row] = True
        if not goes_on.shape[0]:
            break
        alive, byte_ids, bits = alive[goes_on], byte_ids[goes_on], bits[goes_on] == 1
        if goes_on.shape[0] < running.rows:
            running.keep(goes_on)
        for row, byte, bit in zip(alive.tolist(), byte_ids.tolist(), bits.tolist(), strict=True):
            bytes_of[row].append(byte)
            bits_of[row].append(bit)
        running.advance(byte_ids, bits, draws[1, goes_on])
    return [
        Spelled(byte_ids=bytes(bytes_of[row]), bits=tuple(bits_of[row]), tokens=tuple(tokens_of[row]), ended=ended[row])
        for row in range(rows)
    ]


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
