"""What the token teacher itself writes, byte by byte: the loop of a student's generation around the teacher's pairs."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megabyte_distill.data.token_bytes import TokenBytes
from megabyte_distill.inference.generation import Continuations, GenerationMode, GenerationSettings, PromptReading
from megabyte_distill.inference.prompts import too_long
from megabyte_distill.inference.sampling import Sampling, choose
from megabyte_distill.inference.teacher_bytes import TeacherBytes
from megabyte_distill.inference.utf8 import Utf8Mode
from megabyte_distill.model.backbone import Backbone


class TeacherGeneration(Continuations):
    """Continuations drawn from the teacher's exact (byte, bit) pairs; a bit ends a token.

    Without temperature, top_k, top_p and min_p the tokens are samples of the teacher's, but for ids that cannot be
    text. ``prompt_bits``: where the tokens end along which a prompt is read, the likeliest of its bit histories when
    greedy, else one drawn by their posterior. Nothing is forced: a prompt may end inside a token. Of the histories
    that end a token with the same byte the ``paths`` heaviest are followed, so that whatever tokens spell is read.
    """

    def __init__(
        self,
        teacher: Backbone,
        table: TokenBytes,
        prompts: Sequence[str | bytes],
        settings: GenerationSettings,
        names: Sequence[str] | None = None,
    ) -> None:
        """``table``: of the teacher's vocabulary. ``names``: what messages call the prompts (default: by number).

        ValueError as :class:`TeacherBytes` and :class:`Continuations`, for a prompt that is too long or that no tokens
        spell, and for settings that are a student's.
        """
        limit = int(teacher.backbone_config.max_position_embeddings)
        # two numbers a byte: the pair, and which of the ids that are spelled alike
        super().__init__(prompts, settings, teacher.device, limit, names, draws=2)
        if settings.mode is not GenerationMode.JOINT or settings.reading is not PromptReading.PATHS:
            raise ValueError("the teacher writes (byte, bit) pairs and reads prompts along paths; leave the mode out")
        if settings.utf8 is not Utf8Mode.RAW or settings.sampling.boundary_threshold is not None:
            raise ValueError(
                "the teacher's tokens may end inside a character and decide where bits are; leave utf8 and the "
                "boundary threshold out"
            )
        running = TeacherBytes(teacher, table, len(self.prompts))
        histories = _read_prompts(running, self.prompts, self._names, settings.paths, limit)
        rows: list[list[int]] = [[] for _ in self.prompts]
        for row, history in enumerate(histories):
            rows[history.prompt].append(row)
        weights = torch.full((len(rows), max(map(len, rows))), -torch.inf, dtype=torch.float64)
        for number, own in enumerate(rows):
            weights[number, : len(own)] = torch.tensor([histories[row].weight for row in own], dtype=torch.float64)
        only_temperature = Sampling(temperature=settings.sampling.temperature)
        chosen = choose(weights.to(teacher.device), only_temperature, self._uniform[:, 0]).tolist()
        taken = [own[place] for own, place in zip(rows, chosen, strict=True)]
        self.prompt_bits = []
        for row, prompt in zip(taken, self.prompts, strict=True):
            ends = set(histories[row].ends)
            self.prompt_bits.append(tuple(place in ends for place in range(len(prompt))))
        running.keep(torch.tensor(taken, device=teacher.device))
        running.settle()
        alike = None if settings.sampling.temperature == 0 else self._numbers[:, 1:, 1]
        self._cursor = _TeacherPairs(running, alike)


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
class _History:
    """One way in which tokens spell a prompt's beginning."""

    prompt: int
    weight: float
    ends: tuple[int, ...]
    """Places of the bytes that end a token."""


def _read_prompts(
    running: TeacherBytes, prompts: Sequence[bytes], names: Sequence[str], paths: int, limit: int
) -> list[_History]:
    """All bit histories of the prompts that are left at their ends; history i is text i of ``running`` then."""
    found = [_History(number, 0.0, ()) for number in range(len(prompts))]
    are_full: set[int] = set()
    running.branch()
    for place in range(max(len(prompt) for prompt in prompts)):
        here = [prompts[history.prompt][place : place + 1] for history in found]
        byte_ids = torch.tensor([byte[0] if byte else 0 for byte in here], device=running.positions.device)
        chances, positions = running.log_chances(byte_ids).tolist(), running.positions.tolist()
        kept: list[tuple[int, _History]] = []
        ended: dict[int, list[tuple[int, _History]]] = {number: [] for number in range(len(prompts))}
        for row, (history, byte) in enumerate(zip(found, here, strict=True)):
            goes_on, ends = chances[row] if byte else (0.0, -math.inf)
            if goes_on > -math.inf:
                kept.append((row, replace(history, weight=history.weight + goes_on)))
            if ends > -math.inf and positions[row] < limit:
                ended[history.prompt].append((row, replace(history, weight=history.weight + ends)))
            elif ends > -math.inf:
                are_full.add(history.prompt)
        # open histories are not compared with ended ones: they weigh what all tokens do that begin so, and the prompt
        # may go on with none of these
        for steps in ended.values():
            steps.sort(key=lambda step: -step[1].weight)
            kept += [(row, replace(history, ends=(*history.ends, place))) for row, history in steps[:paths]]
        _refuse_unread(prompts, names, place, limit, kept, are_full)
        moved = [new for new, (row, _) in enumerate(kept) if here[row]]
        rows = torch.tensor([row for row, _ in kept], device=byte_ids.device)
        bits = torch.tensor([kept[new][1].ends[-1:] == (place,) for new in moved], device=byte_ids.device)
        running.keep(rows)
        where = torch.tensor(moved, device=byte_ids.device)
        running.advance(byte_ids[rows[where]], bits, rows=where)
        found = [history for _, history in kept]
    return found


def _refuse_unread(
    prompts: Sequence[bytes],
    names: Sequence[str],
    place: int,
    limit: int,
    kept: Sequence[tuple[int, _History]],
    are_full: Collection[int],
) -> None:
    """ValueError where no history of a prompt has read the byte at ``place``."""
    read = {history.prompt for _, history in kept}
    for number, (prompt, name) in enumerate(zip(prompts, names, strict=True)):
        if number in read:
            continue
        if number in are_full:
            raise too_long(name, len(prompt), place, limit, "token")
        raise ValueError(
            f"the {name}: the teacher has no tokens that spell its first {place + 1} bytes, or gives them no "
            "probability at all; end the prompt there, or write it otherwise"
        )
