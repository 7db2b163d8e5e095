"""Joint generation for many prompts: the bytes of ``generation.py``, at a speed.

Rows are independent: row i of the prompts draws with seed + i, whatever runs beside it. A byte inside a chunk costs the
byte side alone; rows that come to a chunk's end wait for each other and step the backbone together, while the others
go on. A finished row's place goes to the next prompt at once. The loop is in ``engine_session.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

from megabyte_distill.alphabet import BOS_BYTE
from megabyte_distill.config.training import KernelMode
from megabyte_distill.inference.bit_paths import device_of
from megabyte_distill.inference.engine_cpu import CpuSlots, refusal
from megabyte_distill.inference.engine_session import Array, EngineCounts, Session
from megabyte_distill.inference.engine_slots import Slots, TorchSlots
from megabyte_distill.inference.generation import Generated, GenerationSettings
from megabyte_distill.inference.prompts import prompt_bytes
from megabyte_distill.inference.sampling import Sampling, choose
from megabyte_distill.inference.speculation import DraftLength, FixedLength, MeasuredLength
from megabyte_distill.inference.state_guess import StateGuess
from megabyte_distill.kernels.step_library import load
from megabyte_distill.model.student import Parts, RouterDecides, Student

_PIECE = 2048
"""Bytes of text that are read at once."""


class Engine:
    """Generates from a student in evaluation mode.

    Attributes:
        counts: of all calls so far.
        guess: of what the backbone will say of a chunk, which drafts are written from; None where nothing is drafted.
    """

    def __init__(
        self,
        student: Student,
        *,
        max_batch_size: int = 32,
        speculate: int | Literal["auto"] = 0,
        kernels: KernelMode = KernelMode.AUTO,
    ) -> None:
        """A student's engine.

        Args:
            student: any but one in official mode, which cannot be stepped.
            max_batch_size: rows that run side by side.
            speculate: bytes drafted behind a chunk's end, 0 for none, ``auto`` for what is measured to be fastest.
                What comes out is the same.
            kernels: ``auto`` steps in the library of kernels/cpu_step where it is built and takes the student,
                ``fused`` demands it, ``reference`` takes torch.

        Raises:
            ValueError: for sizes out of range, and for a demand that cannot be met.
        """
        if max_batch_size < 1:
            raise ValueError(f"max_batch_size is {max_batch_size}; expected at least 1")
        if speculate != "auto" and speculate < 0:
            raise ValueError(f"speculate is {speculate}; expected a number of bytes of at least 0, or auto")
        kernels = KernelMode(kernels)  # "reference" is as good as the member
        self.student, self.max_batch_size = student, max_batch_size
        self.draft_length: DraftLength = MeasuredLength() if speculate == "auto" else FixedLength(speculate)
        self.counts = EngineCounts()
        width, device = student.byte_side_config.backbone_width, device_of(student)
        self.guess = StateGuess(width, device) if self.draft_length.longest else None
        problem = None if kernels is KernelMode.REFERENCE else _fused_problem(student)
        if problem and kernels is KernelMode.FUSED:
            raise ValueError(f"the engine's fused step was asked for, but cannot run: {problem}")
        self.is_fused = kernels is not KernelMode.REFERENCE and problem is None

    def generate(
        self,
        prompts: Sequence[str | bytes],
        settings: GenerationSettings | None = None,
        *,
        prompt_bits: Sequence[Sequence[bool]] | None = None,
    ) -> list[Generated]:
        """The continuation of each prompt, as ``generation.generate`` gives it.

        ``prompt_bits``: boundary bits of the prompts' bytes where they are known; they are inferred otherwise.
        ValueError as ``generation.generate``, and for bits that do not fit.
        """
        session = self.begin(prompts, settings, prompt_bits=prompt_bits)
        for _ in session:
            pass
        return session.results()

    def begin(
        self,
        prompts: Sequence[str | bytes],
        settings: GenerationSettings | None = None,
        *,
        prompt_bits: Sequence[Sequence[bool]] | None = None,
        names: Sequence[str] | None = None,
    ) -> Session:
        """The same, to be iterated over for the new bytes as they come. Errors come at the call.

        ``names``: what messages call the prompts (default: by their numbers).
        """
        return Session(self, prompts, settings or GenerationSettings(), prompt_bits, names)

    def make_slots(self, count: int) -> Slots:
        """Places for so many rows."""
        kind = CpuSlots if self.is_fused else TorchSlots
        return kind(self.student, count, self.guess)

    @torch.no_grad()
    def learn_drafts(self, texts: Iterable[bytes]) -> None:
        """Fit the guess that drafts are written from to texts, in pieces of 2,048 bytes under the router's boundaries.

        The engine learns from what it generates as well; a few ten thousand bytes of text spare it the beginning.
        ValueError for bytes 254 and 255 in one, and where nothing is drafted.
        """
        if self.guess is None:
            raise ValueError("this engine drafts nothing; give speculate a number of bytes, or auto")
        for text in texts:
            raw = prompt_bytes(text, "text")
            for begin in range(0, len(raw), _PIECE):
                row = _TextRow(raw[begin : begin + _PIECE], device_of(self.student))
                found = self.student(row, RouterDecides(), Parts.ENCODER | Parts.ROUTER | Parts.BACKBONE)
                # the last byte is a chunk's end because there is no other
                count = int(found.bits.sum()) - 1
                self.guess.learn(found.chunks[1:count], found.hidden[: count - 1], found.hidden[1:count])

    def pick(
        self,
        log_probabilities: Tensor,
        sampling: Sampling,
        uniform: Tensor,
        *,
        prompts: Array,
        places: Array,
        drafted: Array,
    ) -> Tensor:
        """The next pair's class [N] int64, from log_probabilities [N, 512] and uniform numbers [N]. What may not be
        taken has −inf.

        For a subclass that decides otherwise: ``prompts`` [N] and ``places`` [N] (new bytes in front of it) say whose
        it is, ``drafted`` [N] how many drafts stand in front of it, −1 where it counts. What counts must depend on
        nothing else.
        """
        return choose(log_probabilities, sampling, uniform)


class _TextRow:
    """One document, or a piece of one, as a packed row."""

    chunk_bucket = 1

    def __init__(self, text: bytes, device: torch.device) -> None:
        self.byte_ids = torch.tensor([BOS_BYTE, *text], device=device)
        self.bits = self.byte_ids == BOS_BYTE
        self.is_real = torch.ones_like(self.bits)
        self.cu_seqlens = torch.tensor([0, len(text) + 1], dtype=torch.int32, device=device)


def _fused_problem(student: Student) -> str | None:
    """Why the CPU step cannot run a student here, or None."""
    if problem := refusal(student):
        return problem
    try:
        load()
    except ValueError as error:
        return str(error)
    return None
