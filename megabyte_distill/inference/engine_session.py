"""One call of an engine: which rows step next, what is drafted and verified, who takes a finished row's place.

What is known of the rows is held in arrays on the host, all rows at once; no loop here is over rows and bytes.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from megabyte_distill.alphabet import BOS_BYTE, BYTE_VOCAB, JOINT_CLASSES
from megabyte_distill.inference.bit_paths import device_of
from megabyte_distill.inference.generation import (
    Generated,
    GenerationMode,
    GenerationSettings,
    NewBytes,
    PromptReading,
)
from megabyte_distill.inference.prompt_reading import read_prompts
from megabyte_distill.inference.prompts import checked_prompts, context_limit, prompt_names, refuse_too_long
from megabyte_distill.inference.sampling import Sampling, choose, mask_bytes, mask_padding, uniform_numbers
from megabyte_distill.inference.utf8 import LONGEST_OPEN, Utf8Mode, allowed_after

if TYPE_CHECKING:
    from megabyte_distill.inference.engine import Engine

Array = np.ndarray[Any, np.dtype[Any]]
_GATHERED = 0.5
"""Share of the running rows that wait at a chunk's end before the backbone steps."""


@dataclass
class EngineCounts:
    """What an engine did, prompts not counted."""

    new_bytes: int = 0
    """With the ends of documents."""
    backbone_passes: int = 0
    """Of each row: chunks it stepped by itself, or groups of chunks verified at once."""
    drafted: int = 0
    """Bytes."""
    accepted: int = 0
    """Drafted bytes that were right."""
    runs: Counter[int] = field(default_factory=Counter)
    """Backbone passes by how many drafts they found right."""


class Session:
    """The rows of one call. Iterate over it once for the new bytes; :meth:`results` tells them whole.

    Attributes:
        prompts: as bytes.
        prompt_bits: the segmentation each prompt is continued under; those that were not read yet have none.
    """

    def __init__(
        self,
        engine: Engine,
        prompts: Sequence[str | bytes],
        settings: GenerationSettings,
        prompt_bits: Sequence[Sequence[bool]] | None,
        names: Sequence[str] | None,
    ) -> None:
        """Reads the prompts that run first, and those that may be too long. ValueError as ``Engine.generate``."""
        _check_settings(settings)
        self._engine, self._settings, self._drafting = engine, settings, engine.draft_length
        self.prompts = checked_prompts(prompts, names)
        self._names = names or prompt_names(len(prompts))
        self._limit = context_limit(engine.student)
        self._results: list[Generated | None] = [None] * len(prompts)
        self.prompt_bits: list[tuple[bool, ...]] = [()] * len(prompts)
        self._is_read = np.zeros(len(prompts), bool)
        if prompt_bits is not None:
            self.prompt_bits = _checked_bits(prompt_bits, self.prompts, self._limit, self._names)
            self._is_read[:] = True
        self._device = device_of(engine.student)
        self._on_cpu = self._device.type == "cpu"
        # what others do on the machine is no reason to draft more or less
        self._clock = time.process_time if self._on_cpu else time.perf_counter
        self._new: list[NewBytes] = []
        self._waiting = 0  # the prompt that is next
        count, limit = min(engine.max_batch_size, len(prompts)), settings.max_new_bytes
        self._slots = engine.make_slots(count)
        self._prompt = np.full(count, -1)  # whose row it is
        self._current = np.zeros(count, np.int64)  # the pair chosen last, not yet read
        self._made = np.zeros(count, np.int64)
        self._joint = np.zeros((count, limit), np.int64)
        self._score = np.zeros(count)
        self._stopped = np.zeros(count, bool)
        self._ended = np.zeros(count, bool)
        self._full = np.zeros(count, bool)
        self._positions = np.zeros(count, np.int64)  # of the backbone, in use
        # the last bytes, chosen ones too, where they decide what may follow
        self._tails = np.zeros((count, LONGEST_OPEN), np.int64) if settings.utf8 is Utf8Mode.CONSTRAIN else None
        # greedy choices read no numbers
        self._draws = limit + 1 if settings.sampling.temperature > 0 else 0
        self._uniform = torch.zeros(count, max(self._draws, 1), dtype=torch.float64, device=self._device)
        self._drafts = np.zeros((count, self._drafting.longest + 1), np.int64)  # a chunk's end, then drafts behind it
        self._drafted = np.zeros(count, np.int64)
        self._hope = np.zeros(count)  # log-probability of a row's drafts together
        self._is_drafting = np.zeros(count, bool)
        if self._limit is not None:  # whoever may be refused is refused before anything is written
            self._infer_bits([n for n, prompt in enumerate(self.prompts) if len(prompt) + 1 > self._limit])
        self._advance()

    def __iter__(self) -> Iterator[NewBytes]:
        """The rows' new bytes as they come, each row's in order."""
        is_more = True
        while is_more:
            new, self._new = self._new, []
            yield from new
            is_more = self._advance() or bool(self._new)

    def results(self) -> list[Generated]:
        """The continuation of each prompt, as far as it has been iterated over."""
        row_of = {int(number): row for row, number in enumerate(self._prompt) if number >= 0}
        nothing = Generated(byte_ids=b"", bits=(), prompt_bits=(), log_probability=0.0, ended=False)
        return [
            result or (self._written(row_of[number]) if number in row_of else nothing)
            for number, result in enumerate(self._results)
        ]

    @torch.inference_mode()
    def _advance(self) -> bool:
        """One step of some rows; False where every prompt has had its result before."""
        running = self._prompt >= 0
        total = int(running.sum())
        if self._waiting < len(self.prompts) and total < running.shape[0]:
            self._admit((~running).nonzero()[0])
            return True
        if not total:
            return False
        started, before = self._clock(), self._engine.counts.new_bytes
        parked = self._parked(running)
        waiting = int(parked.sum())
        is_gathered = waiting == total or waiting >= max(_GATHERED * total, 1)
        if is_gathered:
            self._end_chunks(parked.nonzero()[0])
        else:
            self._inside_chunks((running & ~parked).nonzero()[0])
        new_bytes = self._engine.counts.new_bytes - before
        passes = waiting / total if is_gathered else 0.0
        self._drafting.observe(new_bytes, passes, self._clock() - started)
        return True

    def _parked(self, running: Array) -> Array:
        """[R], rows that need the backbone now; those that may draft begin to."""
        length = self._drafting.now
        ends: Array = running & (self._current >= BYTE_VOCAB) & ~self._is_drafting
        if not length and not self._is_drafting.any():
            return ends
        if ends.any():
            rows = ends.nonzero()[0]
            self._slots.save(self._on_device(rows))
            self._drafts[rows, 0], self._drafted[rows], self._is_drafting[rows] = self._current[rows], 0, True
            self._hope[rows] = 0.0
        room = np.minimum(length, self._settings.max_new_bytes - self._made - 1)
        is_over = (self._drafted >= room) | (self._hope < self._drafting.least_hope)
        is_over |= (self._drafted > 0) & (self._current % BYTE_VOCAB == BOS_BYTE)
        parked: Array = self._is_drafting & is_over
        return parked

    def _inside_chunks(self, rows: Array) -> None:
        """One byte of each row that needs no backbone."""
        current, drafting = self._current[rows], self._is_drafting[rows]
        logits = self._slots.step(
            self._on_device(current % BYTE_VOCAB), self._on_device(current >= BYTE_VOCAB), self._on_device(rows)
        )
        drafted = np.where(drafting, self._drafted[rows], -1)
        behind = np.maximum(drafted, 0)
        tails = None if self._tails is None else self._tails_behind(rows)[np.arange(rows.shape[0]), behind]
        joint, score = self._choose(logits, rows, self._made[rows] + behind, drafted, tails)
        self._current[rows] = joint
        if drafting.any():
            drafts = rows[drafting]
            self._drafted[drafts] += 1
            self._hope[drafts] += score[drafting]
            self._drafts[drafts, self._drafted[drafts]] = joint[drafting]
            rows, joint, score = rows[~drafting], joint[~drafting], score[~drafting]
        self._emit(rows, joint[:, None], score[:, None], np.ones_like(rows))

    def _end_chunks(self, rows: Array) -> None:
        """The backbone for rows whose next byte ends a chunk, and all that was drafted behind it."""
        # either no row drafts, or all that are parked do
        drafted = np.where(self._is_drafting[rows], self._drafted[rows], 0)
        longest = int(drafted.max())
        read = self._drafts[rows, : longest + 1] if longest else self._current[rows, None]
        place = np.arange(longest + 1)
        if longest:
            read = np.where(place <= drafted[:, None], read, 0)
        logits = self._slots.read(
            self._on_device(read % BYTE_VOCAB),
            self._on_device(read >= BYTE_VOCAB),
            self._on_device(rows),
            saved=longest > 0,
        )
        every = np.repeat(rows, longest + 1)
        places = (self._made[rows][:, None] + place).flatten()
        tails = None if self._tails is None else self._tails_behind(rows)[:, : longest + 1].reshape(-1, LONGEST_OPEN)
        joint, score = self._choose(logits.flatten(0, 1), every, places, np.full_like(places, -1), tails)
        joint, score = joint.reshape(read.shape), score.reshape(read.shape)
        agrees = (joint[:, :-1] == read[:, 1:]) & (place[1:] <= drafted[:, None])
        counts = agrees.cumprod(1).sum(1) + 1
        self._slots.keep(self._on_device(counts))
        self._current[rows] = joint[np.arange(rows.shape[0]), counts - 1]
        self._is_drafting[rows] = False
        totals = self._engine.counts
        totals.backbone_passes += rows.shape[0]
        totals.drafted += int(drafted.sum())
        totals.accepted += int(counts.sum()) - rows.shape[0]
        totals.runs.update((counts - 1).tolist())
        in_use = self._positions[rows][:, None] + (read >= BYTE_VOCAB).cumsum(1)
        self._positions[rows] = in_use[np.arange(rows.shape[0]), counts - 1]
        if self._limit is None:
            self._emit(rows, joint, score, counts)
            return
        with_room = np.minimum((in_use < self._limit).cumprod(1).sum(1), counts)
        self._emit(rows, joint, score, with_room)
        self._fill(rows[(with_room < counts) & (self._prompt[rows] >= 0)])

    def _fill(self, rows: Array) -> None:
        """These rows end, for the backbone has no position left for them."""
        self._full[rows] = True
        self._finish(rows)

    def _tails_behind(self, rows: Array) -> Array:
        """[K, T, 3], the last bytes behind what is chosen and none, one, two … of the drafts that follow it."""
        assert self._tails is not None
        texts = np.concatenate((self._tails[rows], self._drafts[rows, 1:] % BYTE_VOCAB), axis=1)
        return np.lib.stride_tricks.sliding_window_view(texts, LONGEST_OPEN, axis=1).copy()

    def _choose(
        self, logits: Tensor, rows: Array, places: Array, drafted: Array, tails: Array | None
    ) -> tuple[Array, Array]:
        """(class, log-probability) [N] of what follows ``places`` new bytes of each row; ``drafted`` as in ``pick``.

        ``tails`` [N, 3]: the bytes before it, where UTF-8 is to go on.
        """
        log_probabilities = logits.log_softmax(-1, dtype=torch.float32)
        index = self._on_device(rows)
        if self._draws:
            uniform = self._uniform[index, self._on_device(np.minimum(places + 1, self._draws - 1))]
        else:
            uniform = self._uniform[index, 0]
        if tails is None:
            possible = mask_padding(log_probabilities)
        else:
            possible = mask_bytes(log_probabilities, allowed_after(self._on_device(tails)))
        joint = self._engine.pick(
            possible,
            self._settings.sampling,
            uniform,
            prompts=self._prompt[rows],
            places=places,
            drafted=drafted,
        )
        score = log_probabilities.gather(1, joint[:, None])[:, 0]
        return joint.cpu().numpy(), score.cpu().numpy()

    def _emit(self, rows: Array, joint: Array, score: Array, counts: Array) -> None:
        """The first ``counts`` [K] of joint [K, T] are the rows' next bytes."""
        for place in range(joint.shape[1]):
            more = (counts > place) & (self._prompt[rows] >= 0)
            if not more.any():
                return
            self._emit_one(rows[more], joint[more, place], score[more, place])

    def _emit_one(self, rows: Array, joint: Array, score: Array) -> None:
        self._engine.counts.new_bytes += rows.shape[0]
        self._score[rows] += score
        byte_ids, bits = joint % BYTE_VOCAB, joint >= BYTE_VOCAB
        self._new.append(
            NewBytes(
                rows=self._prompt[rows].tolist(),
                byte_ids=byte_ids.tolist(),
                bits=bits.tolist(),
                log_probabilities=score.tolist(),
            )
        )
        if self._tails is not None:
            self._tails[rows] = np.concatenate((self._tails[rows, 1:], byte_ids[:, None]), axis=1)
        ended = byte_ids == BOS_BYTE
        self._joint[rows, self._made[rows]] = joint
        self._made[rows] += ~ended
        is_over = ended | (self._made[rows] >= self._settings.max_new_bytes)
        self._ended[rows] = ended
        if self._settings.stop:
            self._stopped[rows] = self._at_stop(rows) & ~ended
            is_over |= self._stopped[rows]
        if is_over.any():
            self._finish(rows[is_over])

    def _at_stop(self, rows: Array) -> Array:
        """[K], whether a row's last bytes are a stop string."""
        found = np.zeros(rows.shape[0], bool)
        for stop in self._settings.stop:
            wanted = np.frombuffer(stop, np.uint8)
            places = self._made[rows][:, None] + np.arange(-len(stop), 0)
            last = self._joint[rows[:, None], places.clip(0)] % BYTE_VOCAB
            found |= (places[:, 0] >= 0) & (last == wanted).all(1)
        return found

    def _finish(self, rows: Array) -> None:
        for row in rows.tolist():
            self._results[int(self._prompt[row])] = self._written(row)
        self._prompt[rows] = -1

    def _written(self, row: int) -> Generated:
        joint = self._joint[row, : self._made[row]]
        byte_ids = (joint % BYTE_VOCAB).astype(np.uint8).tobytes()
        stopped_by = None
        if self._stopped[row]:
            stopped_by = max((text for text in self._settings.stop if byte_ids.endswith(text)), key=len)
        size = len(byte_ids) - len(stopped_by or b"")
        return Generated(
            byte_ids=byte_ids[:size],
            bits=tuple((joint[:size] >= BYTE_VOCAB).tolist()),
            prompt_bits=self.prompt_bits[int(self._prompt[row])],
            log_probability=float(self._score[row]),
            ended=bool(self._ended[row]),
            stopped_by=stopped_by,
            is_full=bool(self._full[row]),
        )

    def _admit(self, free: Array) -> None:
        """Waiting prompts take the free places."""
        free = free[: len(self.prompts) - self._waiting]
        numbers = np.arange(self._waiting, self._waiting + free.shape[0])
        self._waiting += free.shape[0]
        self._prompt[free], self._made[free], self._score[free] = numbers, 0, 0.0
        self._is_drafting[free] = self._stopped[free] = self._ended[free] = self._full[free] = False
        for row, number in zip(free.tolist(), numbers.tolist(), strict=True):
            self._uniform[row] = self._numbers_of(number)
        if not self._is_read[numbers].all():  # one by one, prompts would take as many passes as all together
            self._infer_bits(range(int(numbers[0]), min(int(numbers[0]) + self._prompt.shape[0], len(self.prompts))))
        logits = self._read_prompts(free, numbers)
        if not self._settings.max_new_bytes:
            self._finish(free)
            return
        if self._tails is not None:
            for row, number in zip(free.tolist(), numbers.tolist(), strict=True):
                self._tails[row] = list(self.prompts[number][-LONGEST_OPEN:].rjust(LONGEST_OPEN))
        none = np.zeros_like(free)
        tails = None if self._tails is None else self._tails[free]
        joint, score = self._choose(logits, free, none, none - 1, tails)
        self._current[free] = joint
        self._positions[free] = [1 + sum(self.prompt_bits[number]) for number in numbers.tolist()]
        is_full = np.zeros_like(free, dtype=bool) if self._limit is None else self._positions[free] >= self._limit
        self._emit(free, joint[:, None], score[:, None], none + ~is_full)
        self._fill(free[is_full])

    @torch.inference_mode()
    def _infer_bits(self, wanted: Sequence[int]) -> None:
        """Find the segmentation of prompts that have none yet, as many side by side as there are places."""
        unread = [number for number in wanted if not self._is_read[number]]
        only_temperature = Sampling(temperature=self._settings.sampling.temperature)
        for first in range(0, len(unread), self._prompt.shape[0]):
            numbers = unread[first : first + self._prompt.shape[0]]
            names = [self._names[number] for number in numbers]
            texts = [self.prompts[number] for number in numbers]
            settings = self._settings
            read = read_prompts(self._engine.student, texts, settings.paths, names, path_window=settings.path_window)
            uniform = torch.cat([self._numbers_of(number)[:1] for number in numbers]).to(self._device)
            path = choose(read.log_weights, only_temperature, uniform)
            for number, bits in zip(numbers, read.history(path), strict=True):
                self.prompt_bits[number] = tuple(bits)
            self._is_read[numbers] = True

    def _numbers_of(self, number: int) -> Tensor:
        """The uniform numbers [draws] that a prompt draws with; greedy choices read none, and get a zero."""
        if not self._draws:
            return torch.zeros(1, dtype=torch.float64)
        return uniform_numbers(1, self._draws, self._settings.seed + number)[0]

    def _read_prompts(self, rows: Array, numbers: Array) -> Tensor:
        """Joint logits [K, 512] behind the prompts' last bytes."""
        lengths = np.array([len(self.prompts[number]) + 1 for number in numbers])
        shape = rows.shape[0], int(lengths.max())
        byte_ids, bits = np.zeros(shape, np.int64), np.zeros(shape, bool)
        for place, number in enumerate(numbers.tolist()):
            byte_ids[place, : lengths[place]] = np.frombuffer(bytes([BOS_BYTE]) + self.prompts[number], np.uint8)
            bits[place, : lengths[place]] = [True, *self.prompt_bits[number]]
        self._slots.reset(self._on_device(rows))
        logits = torch.zeros(rows.shape[0], JOINT_CLASSES, device=self._device)
        size = max(self._slots.at_once // shape[0], 1)
        for begin in range(0, shape[1], size):
            here = (lengths > begin).nonzero()[0]
            counts = np.minimum(lengths[here] - begin, size)
            block = slice(begin, begin + int(counts.max()))
            found = self._slots.read(
                self._on_device(byte_ids[here, block]),
                self._on_device(bits[here, block]),
                self._on_device(rows[here]),
                saved=False,
            )
            kept = self._on_device(counts)
            self._slots.keep(kept)
            logits[self._on_device(here)] = found[torch.arange(here.shape[0], device=self._device), kept - 1].float()
        return logits

    def _on_device(self, values: Array) -> Tensor:
        tensor = torch.from_numpy(values)
        return tensor if self._on_cpu else tensor.to(self._device)


def _check_settings(settings: GenerationSettings) -> None:
    if settings.mode is not GenerationMode.JOINT or settings.reading is not PromptReading.PATHS:
        raise ValueError(
            f"the engine writes pairs behind prompts read along paths, got mode {settings.mode.value} and reading "
            f"{settings.reading.value}; generation.generate does the others"
        )


def _checked_bits(
    prompt_bits: Sequence[Sequence[bool]], prompts: Sequence[bytes], limit: int | None, names: Sequence[str]
) -> list[tuple[bool, ...]]:
    found, expected = [len(bits) for bits in prompt_bits], [len(prompt) for prompt in prompts]
    if found != expected:
        raise ValueError(f"prompt_bits has {found} bits for prompts of {expected} bytes; give one a byte")
    if limit is not None:
        refuse_too_long(prompt_bits, limit, names)
    return [tuple(bool(bit) for bit in bits) for bits in prompt_bits]
