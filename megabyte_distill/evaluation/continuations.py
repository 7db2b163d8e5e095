"""What the causal byte filter gives to continuations of prompts; what prompts share is read once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megabyte_distill.inference.bit_paths import BitPaths, device_of
from megabyte_distill.inference.prompts import prompt_bytes
from megabyte_distill.model.student import Student


class Continued(NamedTuple):
    """What the filter makes of one prompt and its continuation."""

    prompt_nats: float
    """−log P(prompt), behind BOS."""
    nats: float
    """−log P(continuation | prompt)."""
    is_greedy: bool
    """True where each byte of the continuation was the likeliest one."""


@torch.no_grad()
def score_continuations(
    student: Student, pairs: Sequence[tuple[bytes, bytes]], *, paths: int = 4, batch: int = 32
) -> list[Continued]:
    """Scores (prompt, continuation) pairs, ``batch`` of them side by side; neither needs to end a character.

    A prompt that several pairs have is read once, and so is what all prompts of a batch begin with. ValueError for
    bytes 254 and 255 and in official mode.
    """
    for index, (prompt, continuation) in enumerate(pairs):
        prompt_bytes(prompt + continuation, f"text {index}")
    found: list[Continued | None] = [None] * len(pairs)
    # neighbours share most, and batches of like lengths waste least
    order = sorted(range(len(pairs)), key=lambda index: (-len(pairs[index][0]) // 64, pairs[index][0]))
    for first in range(0, len(order), batch):
        members = order[first : first + batch]
        scored = _score_batch(student, [pairs[index] for index in members], paths)
        for index, result in zip(members, scored, strict=True):
            found[index] = result
    return [result for result in found if result is not None]


@torch.no_grad()
def byte_bits(
    student: Student, texts: Sequence[bytes], *, paths: int = 4, batch: int = 32
) -> list[NDArray[np.float64]]:
    """Bits [L] of every byte of each text under the filter, behind one BOS. Errors as :func:`score_continuations`."""
    found: list[NDArray[np.float64]] = []
    for first in range(0, len(texts), batch):
        members = [
            prompt_bytes(text, f"text {index}") for index, text in enumerate(texts[first : first + batch], first)
        ]
        running = BitPaths(student, len(members), paths)
        nats = [nats.cpu().numpy() for _, nats in _read(running, members)]
        columns = np.stack(nats, 1) if nats else np.zeros((len(members), 0))
        found += [columns[row, : len(text)] / math.log(2) for row, text in enumerate(members)]
    return found


def _score_batch(student: Student, pairs: Sequence[tuple[bytes, bytes]], paths: int) -> list[Continued]:
    prompts = sorted({prompt for prompt, _ in pairs})
    prompt_nats = torch.zeros(len(prompts), dtype=torch.float64, device=device_of(student))
    shared = _common(prompts[0], prompts[-1])
    running = BitPaths(student, 1, paths)
    for _, nats in _read(running, [shared]):
        prompt_nats += nats
    running.keep(torch.zeros(len(prompts), dtype=torch.int64, device=prompt_nats.device))
    for _, nats in _read(running, [prompt[len(shared) :] for prompt in prompts]):
        prompt_nats += nats
    place = torch.tensor([prompts.index(prompt) for prompt, _ in pairs], device=prompt_nats.device)
    running.keep(place)
    total = torch.zeros(len(pairs), dtype=torch.float64, device=place.device)
    greedy = torch.ones(len(pairs), dtype=torch.bool, device=place.device)
    for is_likeliest, nats in _read(running, [continuation for _, continuation in pairs]):
        total += nats
        greedy &= is_likeliest
    rows = zip(prompt_nats[place].tolist(), total.tolist(), greedy.tolist(), strict=True)
    return [Continued(*row) for row in rows]


def _common(first: bytes, last: bytes) -> bytes:
    """What all of some sorted texts begin with, from the first and the last of them."""
    ends = (place for place, (a, b) in enumerate(zip(first, last, strict=False)) if a != b)
    return first[: next(ends, min(len(first), len(last)))]


def _read(running: BitPaths, texts: Sequence[bytes]) -> Iterator[tuple[Tensor, Tensor]]:
    """Reads one text in each row, byte by byte: (is the byte the likeliest [R], its nats [R]); True and 0 behind it."""
    device = running.log_weights.device
    lengths = torch.tensor([len(text) for text in texts], device=device)
    longest = int(lengths.max())
    padded = torch.tensor([list(text.ljust(longest, b"\0")) for text in texts], dtype=torch.int64, device=device)
    for position in range(longest):
        going = lengths > position
        byte = padded[:, position]
        chances = running.next_byte_log_probabilities()
        nats = torch.where(going, -chances.gather(1, byte[:, None])[:, 0], 0.0)
        is_likeliest = ~going | (chances.argmax(-1) == byte)
        if bool(going.all()):
            running.advance(byte)
        else:
            rows = going.nonzero()[:, 0]
            running.advance(byte[rows], rows)
        yield is_likeliest, nats
