"""Joint generation for many prompts: the bytes of ``generation.py``, at a speed.

Rows are independent: row i of the prompts draws with seed + i, whatever runs beside it. A byte inside a chunk costs the
byte side alone; rows that come to a chunk's end wait for each other and step the backbone together, while the others
go on. A finished row's place goes to the next prompt at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megabyte_distill.alphabet import BOS_BYTE, BYTE_VOCAB, JOINT_CLASSES
from megabyte_distill.config.training import KernelMode
from megabyte_distill.inference.bit_paths import device_of
from megabyte_distill.inference.engine_cpu import CpuSlots, refusal
from megabyte_distill.inference.engine_slots import Slots, TorchSlots
from megabyte_distill.inference.generation import Generated, GenerationSettings, NewBytes, checked_prompts, read_prompts
from megabyte_distill.inference.sampling import Sampling, choose, mask_padding, uniform_numbers
from megabyte_distill.kernels.step_library import load
from megabyte_distill.model.student import Student

Array = np.ndarray[Any, np.dtype[Any]]
_PROMPT_BLOCK = 128
"""Bytes of each prompt that are read at once."""
_GATHERED = 0.5
"""Share of the running rows that wait at a chunk's end before the backbone steps."""


class Engine:
    """Generates from a student in evaluation mode."""

    def __init__(
        self,
        student: Student,
        *,
        max_batch_size: int = 32,
        speculate: int = 0,
        kernels: KernelMode = KernelMode.AUTO,
    ) -> None:
        """``max_batch_size`` rows run side by side; ``speculate``: bytes drafted behind a chunk's end, 0 for none.

        ``kernels``: ``auto`` steps in the library of kernels/cpu_step where it is built and takes the student,
        ``fused`` demands it, ``reference`` takes torch. ValueError for sizes out of range, and for a demand that cannot
        be met.
        """
        if max_batch_size < 1:
            raise ValueError(f"max_batch_size is {max_batch_size}; expected at least 1")
        if speculate < 0:
            raise ValueError(f"speculate is {speculate}; expected a number of bytes of at least 0")
        self.student, self.max_batch_size, self.speculate = student, max_batch_size, speculate
        problem = None if kernels is KernelMode.REFERENCE else _fused_problem(student)
        if problem and kernels is KernelMode.FUSED:
            raise ValueError(f"the engine's fused step was asked for, but cannot run: {problem}")
        self._is_fused = kernels is not KernelMode.REFERENCE and problem is None

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
        session = Session(self, prompts, settings or GenerationSettings(), prompt_bits)
        while session.advance():
            session.take_new()
        return [result for result in session.results if result is not None]

    def stream(
        self,
        prompts: Sequence[str | bytes],
        settings: GenerationSettings | None = None,
        *,
        prompt_bits: Sequence[Sequence[bool]] | None = None,
    ) -> Iterator[NewBytes]:
        """The same bytes as they come; a row may have several in one item, in order. Errors come at the call."""
        session = Session(self, prompts, settings or GenerationSettings(), prompt_bits)
        return self._streamed(session)

    def _streamed(self, session: Session) -> Iterator[NewBytes]:
        while session.advance():
            yield from session.take_new()

    def make_slots(self, count: int) -> Slots:
        """Places for so many rows."""
        return CpuSlots(self.student, count) if self._is_fused else TorchSlots(self.student, count)

    def pick(
        self, log_probabilities: Tensor, sampling: Sampling, uniform: Tensor, prompts: Array, places: Array
    ) -> Tensor:
        """The next pair's class [N] int64, from log_probabilities [N, 512] and uniform numbers [N].

        ``prompts`` [N] and ``places`` [N] (new bytes in front of it) say whose it is: for a subclass that decides
        otherwise. It must depend on nothing else.
        """
        return choose(mask_padding(log_probabilities), sampling, uniform)


class Session:
    """One call of an engine.

    Attributes:
        results: of each prompt, None while it runs.
    """

    def __init__(
        self,
        engine: Engine,
        prompts: Sequence[str | bytes],
        settings: GenerationSettings,
        prompt_bits: Sequence[Sequence[bool]] | None,
    ) -> None:
        self._engine, self._settings = engine, settings
        self._prompts = checked_prompts(prompts)
        self._prompt_bits = None if prompt_bits is None else _checked_bits(prompt_bits, self._prompts)
        self.results: list[Generated | None] = [None] * len(prompts)
        self._bits_of: list[tuple[bool, ...]] = [()] * len(prompts)
        self._device = device_of(engine.student)
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
        draws = limit + 1 if settings.sampling.temperature > 0 else 1
        self._uniform = torch.zeros(count, draws, dtype=torch.float64, device=self._device)
        self._drafts = np.zeros((count, engine.speculate + 1), np.int64)  # the pair that ends a chunk, then drafts
        self._drafted = np.zeros(count, np.int64)
        self._is_drafting = np.zeros(count, bool)

    def advance(self) -> bool:
        """One step of some rows; False where every prompt has had its result before."""
        running = self._prompt >= 0
        if self._waiting < len(self._prompts) and not running.all():
            self._admit((~running).nonzero()[0])
            return True
        if not running.any():
            return False
        parked = running & self._comes_to_an_end()
        waiting, total = int(parked.sum()), int(running.sum())
        if waiting == total or waiting >= _GATHERED * total:
            self._end_chunks(parked.nonzero()[0])
        else:
            self._inside_chunks((running & ~parked).nonzero()[0])
        return True

    def take_new(self) -> list[NewBytes]:
        """What came since the last call."""
        new, self._new = self._new, []
        return new

    def _comes_to_an_end(self) -> Array:
        """[R], rows that need the backbone now; those that may draft begin to."""
        ends = self._current >= BYTE_VOCAB
        if not self._engine.speculate:
            return ends
        begins = ends & ~self._is_drafting & (self._prompt >= 0)
        if begins.any():
            rows = begins.nonzero()[0]
            self._slots.save(self._on_device(rows))
            self._drafts[rows, 0], self._drafted[rows], self._is_drafting[rows] = self._current[rows], 0, True
        room = np.minimum(self._engine.speculate, self._settings.max_new_bytes - self._made - 1)
        is_over = (self._drafted >= room) | ((self._drafted > 0) & (self._current % BYTE_VOCAB == BOS_BYTE))
        over: Array = self._is_drafting & is_over
        return over

    def _inside_chunks(self, rows: Array) -> None:
        """One byte of each row that needs no backbone."""
        logits = self._slots.step(self._on_device(self._current[rows] % BYTE_VOCAB), self._on_device(rows))
        drafting = self._is_drafting[rows]
        joint, score = self._choose(logits, rows, self._made[rows] + np.where(drafting, self._drafted[rows], 0))
        self._current[rows] = joint
        if drafting.any():
            drafts = rows[drafting]
            self._drafted[drafts] += 1
            self._drafts[drafts, self._drafted[drafts]] = joint[drafting]
            rows, joint, score = rows[~drafting], joint[~drafting], score[~drafting]
        self._emit(rows, joint[:, None], score[:, None], np.ones_like(rows))

    def _end_chunks(self, rows: Array) -> None:
        """The backbone for rows whose next byte ends a chunk, and all that was drafted behind it."""
        drafted = np.where(self._is_drafting[rows], self._drafted[rows], 0)
        read = self._drafts[rows, : drafted.max() + 1] if self._engine.speculate else self._current[rows, None]
        place = np.arange(read.shape[1])
        bits = (read >= BYTE_VOCAB) & (place <= drafted[:, None])
        logits = self._slots.read(
            self._on_device(read % BYTE_VOCAB),
            self._on_device(bits),
            self._on_device(rows),
            saved=bool(self._engine.speculate),
        )
        every = np.repeat(rows, place.shape[0])
        joint, score = self._choose(logits.flatten(0, 1), every, (self._made[rows][:, None] + place).flatten())
        joint, score = joint.reshape(read.shape), score.reshape(read.shape)
        agrees = (joint[:, :-1] == read[:, 1:]) & (place[1:] <= drafted[:, None])
        counts = agrees.cumprod(1).sum(1) + 1
        self._slots.keep(self._on_device(counts))
        self._current[rows] = joint[np.arange(rows.shape[0]), counts - 1]
        self._is_drafting[rows] = False
        self._emit(rows, joint, score, counts)

    def _choose(self, logits: Tensor, rows: Array, places: Array) -> tuple[Array, Array]:
        """(class, log-probability) [N] of what follows ``places`` new bytes of each row."""
        log_probabilities = logits.float().log_softmax(-1)
        index = self._on_device(rows)
        draw = (
            torch.zeros_like(index)
            if self._uniform.shape[1] == 1
            else self._on_device(np.minimum(places + 1, self._uniform.shape[1] - 1))
        )
        uniform = self._uniform[index, draw]
        joint = self._engine.pick(log_probabilities, self._settings.sampling, uniform, self._prompt[rows], places)
        score = log_probabilities.gather(1, joint[:, None])[:, 0]
        return joint.cpu().numpy(), score.double().cpu().numpy()

    def _emit(self, rows: Array, joint: Array, score: Array, counts: Array) -> None:
        """The first ``counts`` [K] of joint [K, T] are the rows' next bytes."""
        for place in range(int(counts.max(initial=0))):
            now = (counts > place) & (self._prompt[rows] >= 0)
            own, pair = rows[now], joint[now, place]
            byte_ids = pair % BYTE_VOCAB
            self._score[own] += score[now, place]
            self._new.append(
                NewBytes(
                    rows=self._prompt[own].tolist(),
                    byte_ids=byte_ids.tolist(),
                    bits=(pair >= BYTE_VOCAB).tolist(),
                    log_probabilities=score[now, place].tolist(),
                )
            )
            self._ended[own] = byte_ids == BOS_BYTE
            going = own[~self._ended[own]]
            self._joint[going, self._made[going]] = pair[~self._ended[own]]
            self._made[going] += 1
            self._stopped[own] = self._at_stop(own) & ~self._ended[own]
            is_over = self._ended[own] | self._stopped[own] | (self._made[own] >= self._settings.max_new_bytes)
            if is_over.any():
                self._finish(own[is_over])

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
            joint = self._joint[row, : self._made[row]]
            number = int(self._prompt[row])
            self.results[number] = Generated(
                byte_ids=(joint % BYTE_VOCAB).astype(np.uint8).tobytes(),
                bits=tuple((joint >= BYTE_VOCAB).tolist()),
                prompt_bits=self._bits_of[number],
                log_probability=float(self._score[row]),
                ended=bool(self._ended[row]),
                stopped=bool(self._stopped[row]),
            )
        self._prompt[rows] = -1

    def _admit(self, free: Array) -> None:
        """Waiting prompts take the free places."""
        free = free[: len(self._prompts) - self._waiting]
        numbers = np.arange(self._waiting, self._waiting + free.shape[0])
        self._waiting += free.shape[0]
        self._prompt[free], self._made[free], self._score[free], self._is_drafting[free] = numbers, 0, 0.0, False
        for row, number in zip(free.tolist(), numbers.tolist(), strict=True):
            self._uniform[row] = uniform_numbers(1, self._uniform.shape[1], self._settings.seed + number)[0]
        self._infer_bits(free, numbers)
        logits = self._read_prompts(free, numbers)
        if not self._settings.max_new_bytes:
            self._finish(free)
            return
        joint, score = self._choose(logits, free, np.zeros_like(free))
        self._current[free] = joint
        self._emit(free, joint[:, None], score[:, None], np.ones_like(free))

    def _infer_bits(self, rows: Array, numbers: Array) -> None:
        if self._prompt_bits is not None:
            for number in numbers.tolist():
                self._bits_of[number] = self._prompt_bits[number]
            return
        texts = [self._prompts[number] for number in numbers.tolist()]
        with torch.no_grad():
            read = read_prompts(self._engine.student, texts, self._settings.paths)
            only_temperature = Sampling(temperature=self._settings.sampling.temperature)
            path = choose(read.log_weights, only_temperature, self._uniform[self._on_device(rows), 0])
        for number, bits in zip(numbers.tolist(), read.history(path), strict=True):
            self._bits_of[number] = tuple(bits)

    def _read_prompts(self, rows: Array, numbers: Array) -> Tensor:
        """Joint logits [K, 512] behind the prompts' last bytes."""
        lengths = np.array([len(self._prompts[number]) + 1 for number in numbers])
        byte_ids, bits = (
            np.zeros((rows.shape[0], lengths.max()), np.int64),
            np.zeros((rows.shape[0], lengths.max()), bool),
        )
        for place, number in enumerate(numbers.tolist()):
            byte_ids[place, : lengths[place]] = np.frombuffer(bytes([BOS_BYTE]) + self._prompts[number], np.uint8)
            bits[place, : lengths[place]] = [True, *self._bits_of[number]]
        self._slots.reset(self._on_device(rows))
        logits = torch.zeros(rows.shape[0], JOINT_CLASSES, device=self._device)
        for begin in range(0, int(lengths.max()), _PROMPT_BLOCK):
            here = (lengths > begin).nonzero()[0]
            counts = np.minimum(lengths[here] - begin, _PROMPT_BLOCK)
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
        return torch.from_numpy(values).to(self._device)


def _fused_problem(student: Student) -> str | None:
    """Why the CPU step cannot run a student here, or None."""
    if problem := refusal(student):
        return problem
    try:
        load()
    except ValueError as error:
        return str(error)
    return None


def _checked_bits(prompt_bits: Sequence[Sequence[bool]], prompts: Sequence[bytes]) -> list[tuple[bool, ...]]:
    found, expected = [len(bits) for bits in prompt_bits], [len(prompt) for prompt in prompts]
    if found != expected:
        raise ValueError(f"prompt_bits has {found} bits for prompts of {expected} bytes; give one a byte")
    return [tuple(bool(bit) for bit in bits) for bits in prompt_bits]
