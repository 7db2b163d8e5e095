"""K bit histories of a text side by side: the sum over segmentations, and the causal byte model that stock tools see.

A path is one choice of boundary bits for the bytes read so far; its weight is the joint log-probability of those bytes
and bits. Reading a byte splits each path in two, and the K heaviest remain: the mass of the others is lost, so the
summed weight never exceeds the text's probability.

The encoder reads bytes alone, so it runs once for all paths of a text; what paths have in common in the backbone's
cache is kept once (branching_cache.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megabyte_distill.alphabet import BOS_BYTE, BYTE_VOCAB, JOINT_CLASSES
from megabyte_distill.config.model import DechunkMode
from megabyte_distill.inference.branching_cache import BranchingCache
from megabyte_distill.model.byte_decoder import DechunkState, dechunk_step
from megabyte_distill.model.byte_stack import StackState
from megabyte_distill.model.chunking import PoolState, pool_step
from megabyte_distill.model.row_state import RowState
from megabyte_distill.model.student import Student, StudentState


@dataclass(frozen=True, slots=True)
class PathStates(RowState):
    """What differs from path to path beside the backbone's cache."""

    pool: PoolState
    dechunk: DechunkState
    decoder: StackState


@dataclass(frozen=True, slots=True)
class RowsSoFar:
    """R rows that have read something along one path each."""

    state: StudentState
    logits: Tensor
    """[R, 512], joint, of what comes next."""
    bits: Sequence[Sequence[bool]]
    """Of the bytes read behind BOS."""


class BitPaths:
    """R texts read byte by byte, each along K paths. Begins behind BOS, or where one path has come to.

    Attributes:
        log_weights: [R, K] fp64, natural log; −inf where a path does not exist yet.
        log_probabilities: [R, K, 512] fp32, of the next (byte, bit) after each path.
    """

    def __init__(
        self, student: Student, rows: int, paths: int, *, keep_history: bool = False, begun: RowsSoFar | None = None
    ) -> None:
        """``keep_history`` keeps what :meth:`history` needs; ``begun`` is taken over. ValueError where R or K is 0."""
        if rows < 1 or paths < 1:
            raise ValueError(f"{rows} texts along {paths} paths; expected at least one of each")
        self.student, self.paths = student, paths
        begun = begun or _behind_bos(student, rows)
        state, device = begun.state, begun.logits.device
        every = torch.arange(rows, device=device).repeat_interleave(paths)
        self._mode = DechunkMode(student.byte_side_config.dechunk_mode)
        self._encoder, self._r = state.encoder, state.r_previous  # R rows; the others have R · K
        self._states = PathStates(state.pool, state.dechunk, state.decoder).select(every)
        self._cache = BranchingCache.of(state.cache, every)
        self.log_probabilities = _normalize(begun.logits)[every].view(rows, paths, JOINT_CLASSES)
        self.log_weights = torch.full((rows, paths), -torch.inf, dtype=torch.float64, device=device)
        self.log_weights[:, 0] = 0.0
        self._begun = begun.bits
        self._history: list[tuple[Tensor, Tensor, Tensor]] | None = [] if keep_history else None

    @property
    def rows(self) -> int:
        """R."""
        return self.log_weights.shape[0]

    def log_probability(self) -> Tensor:
        """[R] fp64: log of the summed probability of what was read along the paths kept; at most the model's own."""
        return self.log_weights.logsumexp(-1)

    def next_log_probabilities(self) -> Tensor:
        """[R, 512] fp64: log-probabilities of the next (byte, bit), paths weighted by their posterior."""
        weights = self.log_weights - self.log_probability()[:, None]
        return (weights[..., None] + self.log_probabilities).logsumexp(1)

    def next_byte_log_probabilities(self) -> Tensor:
        """[R, 256] fp64: log P(x_{t+1} | x_{≤t}) = log Σ_k w_k Σ_bit P_k(x_{t+1}, bit). Sums to one."""
        joint = self.next_log_probabilities()
        return torch.logaddexp(joint[:, :BYTE_VOCAB], joint[:, BYTE_VOCAB:])

    def log_probability_of(self, byte_ids: Tensor) -> Tensor:
        """[R] fp64: of one next byte [R] int64 in each row, as :meth:`next_byte_log_probabilities` has it."""
        both_bits = self.log_weights[..., None] + self._scores(byte_ids, slice(None))
        return both_bits.flatten(1).logsumexp(-1) - self.log_probability()

    def _scores(self, byte_ids: Tensor, rows: Tensor | slice) -> Tensor:
        """[N, K, 2] log-probabilities of one byte [N] in each of the rows [N], with either bit."""
        observed = torch.stack((byte_ids, byte_ids + BYTE_VOCAB), dim=-1)
        return self.log_probabilities[rows].gather(2, observed[:, None].expand(-1, self.paths, -1))

    def advance(self, byte_ids: Tensor, rows: Tensor | None = None) -> None:
        """Read one byte [N] int64 in each of the rows [N] int64, distinct (default: all rows, in order)."""
        whole = rows is None
        index = torch.arange(self.rows, device=byte_ids.device) if rows is None else rows
        candidates = self.log_weights[index][..., None] + self._scores(byte_ids, index)
        kept = torch.zeros(candidates.shape, dtype=torch.bool, device=byte_ids.device)
        kept.flatten(1).scatter_(1, candidates.flatten(1).topk(self.paths).indices, True)
        # a path with one heir hands its place on; one with two takes the place of one that died, of the same row: per
        # row there are as many of the former as of the latter, and both are listed row by row
        bits = kept[..., 1] & ~kept[..., 0]
        weights = torch.where(bits, candidates[..., 1], candidates[..., 0])
        heirs = kept.sum(-1)
        forked, dead = (heirs == 2).flatten().nonzero()[:, 0], (heirs == 0).flatten().nonzero()[:, 0]
        slots = self._slots(index)
        bits, weights = bits.flatten(), weights.flatten()
        parents = slots
        if forked.shape[0]:
            weights[dead] = candidates[..., 1].flatten()[forked]
            bits[dead] = True
            parents = slots.clone()
            parents[dead] = slots[forked]
            self._branch(slots[forked], slots[dead])
        if self._history is not None:
            self._history.append((slots, parents, bits))
        logits = self._read(byte_ids, bits, None if whole else index, slots)
        self.log_weights[index] = weights.view(-1, self.paths)
        following = _normalize(logits).view(-1, self.paths, JOINT_CLASSES)
        if whole:
            self.log_probabilities = following
        else:
            self.log_probabilities[index] = following

    @torch.no_grad()
    def _read(self, byte_ids: Tensor, bits: Tensor, rows: Tensor | None, slots: Tensor) -> Tensor:
        """Joint logits [N · K, 512] behind one byte [N] of rows [N] (None: all), the bits [N · K] of their paths given.

        Student.step, but for the encoder, which runs once a row.
        """
        student = self.student
        r, encoder = student.byte_encoder.step(byte_ids, self._encoder if rows is None else self._encoder.select(rows))
        p_previous = torch.ones(r.shape[0], device=r.device)
        if self._mode is DechunkMode.CAUSAL:
            p_previous = student.router.step(self._r if rows is None else self._r[rows], r)
        states = self._states if rows is None else self._states.select(slots)
        wide = r.repeat_interleave(self.paths, dim=0)
        chunks, pool = pool_step(states.pool, wide, bits, student.pooling)
        ended = bits.nonzero()[:, 0]
        h = torch.zeros_like(wide)
        if ended.shape[0]:
            h[ended] = student.backbone.step(chunks[ended], self._cache, slots[ended]).to(h.dtype)  # type: ignore[operator]
        p_of_path = p_previous.repeat_interleave(self.paths)
        s, dechunk = dechunk_step(states.dechunk, bits, h, p_of_path, self._mode)
        logits, decoder = student.byte_decoder.step(s, wide, byte_ids.repeat_interleave(self.paths), states.decoder)
        following = PathStates(pool, dechunk, decoder)
        if rows is None:
            self._encoder, self._r, self._states = encoder, r, following
        else:
            self._encoder.put(rows, encoder)
            self._r[rows] = r
            self._states.put(slots, following)
        return logits

    def _branch(self, source: Tensor, target: Tensor) -> None:
        """Places ``target`` [N] become what places ``source`` [N] are."""
        self._states.put(target, self._states.select(source))
        self._cache.branch(source, target)

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows [N] int64 only, in this order."""
        assert self._history is None, "rows of a history cannot be dropped"
        slots = self._slots(rows)
        self._encoder, self._r, self._states = self._encoder.select(rows), self._r[rows], self._states.select(slots)
        self._cache.keep(slots)
        self.log_weights, self.log_probabilities = self.log_weights[rows], self.log_probabilities[rows]

    def restart(self, rows: Tensor) -> None:
        """These rows [N] int64, distinct, begin a new text, behind BOS."""
        assert self._history is None, "a history does not reach over a text's start"
        fresh = BitPaths(self.student, rows.shape[0], self.paths)
        slots = self._slots(rows)
        self._encoder.put(rows, fresh._encoder)
        self._r[rows] = fresh._r
        self._states.put(slots, fresh._states)
        self._cache.put(slots, fresh._cache.plain(fresh._slots(torch.arange(fresh.rows, device=rows.device))))
        self.log_weights[rows], self.log_probabilities[rows] = fresh.log_weights, fresh.log_probabilities

    def positions(self) -> Tensor:
        """[R] int64, positions of the backbone in use: those of the path that needs the fewest."""
        return self._cache.lengths.view(self.rows, self.paths).amin(1)

    def settle(self, path_of_row: Tensor) -> tuple[StudentState, Tensor]:
        """(state of R rows, log-probabilities [R, 512]) of one chosen path [R] int64 a row."""
        index = torch.arange(self.rows, device=path_of_row.device)
        slots = index * self.paths + path_of_row
        states = self._states.select(slots)
        state = StudentState(
            encoder=self._encoder.select(index),
            decoder=states.decoder,
            pool=states.pool,
            dechunk=states.dechunk,
            cache=self._cache.plain(slots),
            r_previous=self._r.clone(),
        )
        return state, self.log_probabilities[index, path_of_row]

    def history(self, path_of_row: Tensor) -> list[list[bool]]:
        """The bits of all bytes read, along one path [R] int64 a row; rows may have read different numbers of bytes."""
        assert self._history is not None
        slot = torch.arange(self.rows, device=path_of_row.device) * self.paths + path_of_row
        found: list[list[bool]] = [[] for _ in range(self.rows)]
        size = self.rows * self.paths
        for slots, parents, bits in reversed(self._history):
            value = torch.full((size,), -1, dtype=torch.int64, device=slot.device)
            value[slots] = bits.to(torch.int64)
            for row, bit in enumerate(value[slot].tolist()):
                if bit >= 0:
                    found[row].append(bool(bit))
            parent = torch.arange(size, device=slot.device)
            parent[slots] = parents
            slot = parent[slot]
        return [[*begun, *bits[::-1]] for begun, bits in zip(self._begun, found, strict=True)]

    def _slots(self, rows: Tensor) -> Tensor:
        """Places [N · K] in the state of the paths of rows [N]."""
        return (rows[:, None] * self.paths + torch.arange(self.paths, device=rows.device)).flatten()


def device_of(student: Student) -> torch.device:
    """Where its parameters are."""
    return next(student.parameters()).device


def _behind_bos(student: Student, rows: int) -> RowsSoFar:
    state = student.init_state(rows)
    start = torch.full((rows,), BOS_BYTE, dtype=torch.int64, device=state.r_previous.device)
    logits = student.step(start, torch.ones_like(start, dtype=torch.bool), state)
    return RowsSoFar(state, logits, [[]] * rows)


def _normalize(logits: Tensor) -> Tensor:
    return logits.float().log_softmax(-1)
