"""The paper's way of reading a prompt and going on, for comparison: cut where the router says, and at the prompt's end.

What it gets wrong (docs/generation.md): a prompt's last byte is forced to end a chunk, so a prompt that stops inside a
word or a character is cut there. Under ``--dechunk-mode official`` a prompt is read with an average over chunks that
the steps behind it no longer make.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megabyte_distill.alphabet import BOS_BYTE, JOINT_CLASSES
from megabyte_distill.inference.prompts import context_limit, prompt_names, refuse_too_long
from megabyte_distill.kernels.ops import P_CLAMP
from megabyte_distill.model.chunking import pool_step
from megabyte_distill.model.router import decide
from megabyte_distill.model.student import Parts, RouterDecides, Student, StudentState


@dataclass(frozen=True, slots=True)
class _Texts:
    """Texts behind one BOS each, one segment each, for :meth:`Student.forward`."""

    byte_ids: Tensor
    bits: Tensor
    is_real: Tensor
    cu_seqlens: Tensor
    chunk_bucket: int = 1


class OfficialReader:
    """R prompts read under the router's boundaries, the last byte of each one's forced.

    Attributes:
        bits: [R] lists of the prompts' boundary bits.
        state: of the rows, for :meth:`step`.
        log_probabilities: [R, 512] fp32 of the next (byte, bit).
    """

    @torch.no_grad()
    def __init__(
        self, student: Student, prompts: Sequence[bytes], *, threshold: float = 0.5, names: Sequence[str] | None = None
    ) -> None:
        """``threshold``: above which the router's p ends a chunk. ``names``: of the prompts, for messages."""
        self._student = student
        device = student.byte_encoder.embedding.weight.device
        sizes = torch.tensor([1 + len(prompt) for prompt in prompts])
        offsets = torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
        joined = b"".join(bytes([BOS_BYTE]) + prompt for prompt in prompts)
        byte_ids = torch.tensor(list(joined), dtype=torch.int64, device=device)
        every = torch.ones_like(byte_ids, dtype=torch.bool)
        row = _Texts(byte_ids, every, every, offsets.to(device, torch.int32))
        p = student(row, RouterDecides(), Parts.ENCODER | Parts.ROUTER).p
        # a segment's last p is 1: the forced boundary
        bits = decide(p, byte_ids, threshold, official=student.is_official)
        edges = offsets.tolist()
        self.bits = [bits[begin + 1 : end].tolist() for begin, end in itertools.pairwise(edges)]
        limit = context_limit(student)
        if limit is not None:
            refuse_too_long(self.bits, limit, names or prompt_names(len(prompts)))
        self.state = student.init_state(len(prompts))
        self.log_probabilities = torch.zeros(len(prompts), JOINT_CLASSES, device=device)
        for position in range(int(sizes.max())):
            rows = (sizes > position).nonzero()[:, 0]
            place, rows = (offsets[rows] + position).to(device), rows.to(device)
            own = self.state.select(rows)
            logits = self._step(byte_ids[place], bits[place], own, p[place])
            self.state.put(rows, own)
            self.log_probabilities[rows] = logits.float().log_softmax(-1)

    @torch.no_grad()
    def step(self, byte_ids: Tensor, bits: Tensor, state: StudentState) -> Tensor:
        """One byte [R] and its bit in each row of ``state``, updated in place → joint logits [R, 512] behind it."""
        return self._step(byte_ids, bits, state, None)

    def _step(self, byte_ids: Tensor, bits: Tensor, state: StudentState, p: Tensor | None) -> Tensor:
        if not self._student.is_official:
            return self._student.step(byte_ids, bits, state)
        return _averaging_step(self._student, byte_ids, bits, state, p)


def _averaging_step(student: Student, byte_ids: Tensor, bits: Tensor, state: StudentState, p: Tensor | None) -> Tensor:
    """A step under official dechunk. p [R] of the byte itself weighs its chunk; None: no average, as p is not known."""
    null_group = student.byte_decoder.null_group
    assert null_group is not None
    r, encoder = student.byte_encoder.step(byte_ids, state.encoder)
    chunks, pool = pool_step(state.pool, r, bits, student.pooling)
    ended = bits.nonzero()[:, 0]
    value, begun = state.dechunk.value.clone(), state.dechunk.begun | bits
    if ended.shape[0]:
        h = student.backbone.step(chunks[ended], state.cache, ended)  # type: ignore[operator]
        h = h.to(value.dtype)
        if p is not None:
            weight = p[ended, None].to(value.dtype).clamp(P_CLAMP, 1.0 - P_CLAMP)
            h = weight * h + (1.0 - weight) * value[ended]
        value[ended] = h
    s = torch.where(begun[:, None], value, null_group.to(value.dtype)).to(r.dtype)
    logits, decoder = student.byte_decoder.step(s, r, byte_ids, state.decoder)
    state.encoder, state.decoder, state.pool, state.r_previous = encoder, decoder, pool, r
    state.dechunk = replace(state.dechunk, value=value, begun=begun)
    return logits
