"""Reads prompts: their ends along K bit histories, what stands in front under the router's boundaries.

Along the paths a prompt is read byte by byte. Where they part they join again a few bytes on, so only its end needs
them; the bytes in front go through the student in blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megabyte_distill.alphabet import BOS_BYTE, JOINT_CLASSES
from megabyte_distill.inference.bit_paths import BitPaths, RowsSoFar, device_of
from megabyte_distill.inference.prompts import PATH_WINDOW, context_limit, fitting_bytes, prompt_names, too_long
from megabyte_distill.model.router import decide
from megabyte_distill.model.student import Student

_BLOCK = 512
"""Bytes of a prompt that go through the student at once."""


@torch.no_grad()
def read_prompts(
    student: Student,
    prompts: Sequence[bytes],
    paths: int,
    names: Sequence[str] | None = None,
    *,
    path_window: int = PATH_WINDOW,
) -> BitPaths:
    """Reads prompts of any lengths along K paths; row i of the result stands behind prompt i's last byte.

    The bytes in front of a prompt's last ``path_window`` are cut where the router cuts. ValueError where a prompt needs
    more chunks than the backbone has positions, and names it as ``names`` does (default: by its number).
    """
    names = names or prompt_names(len(prompts))
    fronts = [max(len(prompt) - path_window, 0) for prompt in prompts]
    # no name for what the fronts left behind: its cache would stay beside the one that is made of it
    read = BitPaths(
        student,
        len(prompts),
        paths,
        keep_history=True,
        begun=_read_fronts(student, prompts, fronts, names) if any(fronts) else None,
    )
    _read_ends(read, prompts, fronts, names)
    return read


def _read_ends(read: BitPaths, prompts: Sequence[bytes], fronts: Sequence[int], names: Sequence[str]) -> None:
    """Everything behind the first ``fronts`` [R] bytes, byte by byte."""
    device, limit = read.log_weights.device, context_limit(read.student)
    ends = [prompt[front:] for prompt, front in zip(prompts, fronts, strict=True)]
    lengths = torch.tensor([len(end) for end in ends], device=device)
    longest, shortest, before = int(lengths.max()), int(lengths.min()), max(fronts)
    padded = torch.tensor([list(end.ljust(longest, b"\0")) for end in ends], dtype=torch.int64, device=device)
    for position in range(longest):
        rows = None if position < shortest else (lengths > position).nonzero()[:, 0]
        column = padded[:, position]
        read.advance(column if rows is None else column[rows], rows)
        if limit is not None and before + position + 2 > limit:  # a byte is one chunk at most, and BOS is one
            for name, prompt, front, chunks in zip(names, prompts, fronts, read.positions().tolist(), strict=True):
                if chunks > limit:
                    raise too_long(name, len(prompt), front + position, limit)


def _read_fronts(student: Student, prompts: Sequence[bytes], fronts: Sequence[int], names: Sequence[str]) -> RowsSoFar:
    """The first ``fronts`` [R] bytes of each prompt, each followed by one at least; none is read before all fit."""
    bits = [
        _router_bits(student, prompt, front, name) if front else []
        for prompt, front, name in zip(prompts, fronts, names, strict=True)
    ]
    device, count = device_of(student), len(prompts)
    state, logits = student.init_state(count), torch.zeros(count, JOINT_CLASSES, device=device)
    for index, (prompt, front) in enumerate(zip(prompts, fronts, strict=True)):
        row = torch.tensor([index], device=device)
        byte_ids = torch.tensor([[BOS_BYTE, *prompt[:front]]], device=device)
        ends = torch.tensor([[True, *bits[index]]], device=device)
        for ids, own_ends in zip(torch.split(byte_ids, _BLOCK, 1), torch.split(ends, _BLOCK, 1), strict=True):
            found, span = student.steps(ids, own_ends, state, row)
            span.keep(torch.tensor([ids.shape[1]], device=device))
            logits[index] = found[0, -1].float()
    return RowsSoFar(state, logits, bits)


def _router_bits(student: Student, prompt: bytes, front: int, name: str) -> list[bool]:
    """Boundary bits of a prompt's first ``front`` bytes; the byte behind them is only looked at."""
    device, limit = device_of(student), context_limit(student)
    state = student.init_state(1)
    encoder, before = state.encoder, state.r_previous
    byte_ids = torch.tensor([[BOS_BYTE, *prompt[: front + 1]]], device=device)
    found: list[Tensor] = []
    begin = chunks = 0
    for ids in torch.split(byte_ids, _BLOCK, 1):
        r, span = student.byte_encoder.steps(ids, encoder)
        encoder = span.after(torch.tensor([ids.shape[1]], device=device))
        p = student.router.step(torch.cat((before, r[0, :-1])), r[0])  # of the bytes one place in front of the block's
        before, end = r[0, -1:], begin + ids.shape[1]
        found.append(decide(p if begin else p[1:], byte_ids[0, max(begin - 1, 0) : end - 1]))
        chunks, begin = chunks + int(found[-1].sum()), end
        if limit is not None and chunks > limit:
            raise too_long(name, len(prompt), fitting_bytes(torch.cat(found)[1:].tolist(), limit), limit)
    return torch.cat(found)[1:].tolist()
