"""What the token teacher itself writes, byte by byte: the loop of a student's generation around the teacher's pairs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megabyte_distill.data.token_bytes import TokenBytes
from megabyte_distill.inference.generation import Continuations, GenerationMode, GenerationSettings, PromptReading
from megabyte_distill.inference.prompts import prompt_name, refuse_too_long
from megabyte_distill.inference.sampling import Sampling, choose, uniform_numbers
from megabyte_distill.inference.teacher_bytes import TeacherBytes
from megabyte_distill.inference.utf8 import Utf8Mode
from megabyte_distill.model.backbone import Backbone


class TeacherGeneration(Continuations):
    """Continuations drawn from the teacher's exact (byte, bit) pairs; a bit ends a token.

    Without temperature, top_k, top_p and min_p the tokens are samples of the teacher's, but for ids that cannot be
    text. ``prompt_bits``: where the tokens end along which a prompt is read, the likeliest of its ``paths`` when
    greedy, else one drawn by their posterior. Nothing is forced: a prompt may end inside a token.
    """

    def __init__(
        self, teacher: Backbone, table: TokenBytes, prompts: Sequence[str | bytes], settings: GenerationSettings
    ) -> None:
        """``table``: of the teacher's vocabulary.

        ValueError as :class:`TeacherBytes` and :class:`Continuations`, for a prompt that is too long or that no tokens
        spell, and for settings that are a student's.
        """
        limit = int(teacher.backbone_config.max_position_embeddings)
        super().__init__(prompts, settings, teacher.device, limit)
        if settings.mode is not GenerationMode.JOINT or settings.reading is not PromptReading.PATHS:
            raise ValueError("the teacher writes (byte, bit) pairs and reads prompts along paths; leave the mode out")
        if settings.utf8 is not Utf8Mode.RAW or settings.sampling.boundary_threshold is not None:
            raise ValueError(
                "the teacher's tokens may end inside a character and decide where bits are; leave utf8 and the "
                "boundary threshold out"
            )
        # two numbers a byte: the pair, and which of the ids that are spelled alike
        count, size = len(self.prompts), settings.max_new_bytes + 1
        numbers = uniform_numbers(count, 2 * size, settings.seed).to(teacher.device).view(count, size, 2)
        self._uniform = numbers[:, :, 0]
        running = TeacherBytes(teacher, table, count)
        paths = _read_prompts(running, self.prompts, settings.paths)
        weights = torch.full((count, settings.paths), -torch.inf, dtype=torch.float64)
        rows: list[list[int]] = [[] for _ in self.prompts]
        for row, path in enumerate(paths):
            weights[path.prompt, len(rows[path.prompt])] = path.weight
            rows[path.prompt].append(row)
        only_temperature = Sampling(temperature=settings.sampling.temperature)
        chosen = choose(weights.to(teacher.device), only_temperature, self._uniform[:, 0]).tolist()
        taken = [rows[number][place] for number, place in enumerate(chosen)]
        self.prompt_bits = [paths[row].bits for row in taken]
        running.keep(torch.tensor(taken, device=teacher.device))
        running.settle()
        refuse_too_long(self.prompt_bits, limit)
        self._cursor = _TeacherPairs(running, None if settings.sampling.temperature == 0 else numbers[:, 1:, 1])


class _TeacherPairs:
    """Texts of the teacher that draw (byte, bit) pairs."""

    def __init__(self, running: TeacherBytes, alike: Tensor | None) -> None:
        """``alike`` [R, max_new_bytes]: a number for each byte; None takes the likeliest of equal spellings."""
        self._running, self._alike, self._place = running, alike, 0
        self.log_probabilities = running.next_pairs().log()

    def advance(self, byte_ids: Tensor, bits: Tensor) -> None:
        self._running.advance(byte_ids, bits, None if self._alike is None else self._alike[:, self._place])
        self._place += 1
        self.log_probabilities = self._running.next_pairs().log()

    def keep(self, rows: Tensor) -> None:
        self._running.keep(rows)
        self.log_probabilities = self.log_probabilities[rows]
        self._alike = None if self._alike is None else self._alike[rows]

    def positions(self) -> Tensor:
        return self._running.positions


@dataclass(frozen=True, slots=True)
class _Path:
    """One way in which tokens spell a prompt's beginning."""

    prompt: int
    weight: float
    bits: tuple[bool, ...]


def _read_prompts(running: TeacherBytes, prompts: Sequence[bytes], paths: int) -> list[_Path]:
    """The ``paths`` heaviest bit histories of each prompt; path i is text i of ``running`` then."""
    found = [_Path(number, 0.0, ()) for number in range(len(prompts))]
    running.branch()
    for place in range(max(len(prompt) for prompt in prompts)):
        here = [prompts[path.prompt][place : place + 1] for path in found]
        byte_ids = torch.tensor([byte[0] if byte else 0 for byte in here], device=running.positions.device)
        chances = running.log_chances(byte_ids).tolist()
        goes_on: dict[int, list[tuple[float, int, bool]]] = {number: [] for number in range(len(prompts))}
        for row, (path, byte) in enumerate(zip(found, here, strict=True)):
            steps = [(path.weight + chances[row][bit], row, bit == 1) for bit in (0, 1)]
            goes_on[path.prompt] += (
                [step for step in steps if step[0] > -math.inf] if byte else [(path.weight, row, False)]
            )
        for number, steps in goes_on.items():
            if not steps:
                name = prompt_name(number, len(prompts))
                raise ValueError(f"the {name}: the teacher has no tokens that spell its first {place + 1} bytes")
            steps.sort(key=lambda step: -step[0])
        kept = [(number, *step) for number, steps in goes_on.items() for step in steps[:paths]]
        running.keep(torch.tensor([row for _, _, row, _ in kept], device=byte_ids.device))
        moved = torch.tensor([new for new, (_, _, row, _) in enumerate(kept) if here[row]], device=byte_ids.device)
        bits = torch.tensor([bit for _, _, row, bit in kept if here[row]], device=byte_ids.device)
        running.advance(byte_ids[[row for _, _, row, _ in kept if here[row]]], bits, rows=moved)
        found = [
            _Path(number, weight, (*found[row].bits, bit) if here[row] else found[row].bits)
            for number, weight, row, bit in kept
        ]
    return found
