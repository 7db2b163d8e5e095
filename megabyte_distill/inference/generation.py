"""Plain generation, one byte of each row at a time: (byte, bit) pairs, or bytes with their bits summed out.

A faster engine must give the same bytes.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

import torch
from torch import Tensor

from megabyte_distill.alphabet import BOS_BYTE, split_class
from megabyte_distill.config.ranges import COUNT, SEED, SIZE
from megabyte_distill.inference.bit_paths import BitPaths, device_of
from megabyte_distill.inference.official import OfficialReader
from megabyte_distill.inference.prompt_reading import read_prompts
from megabyte_distill.inference.prompts import PATH_WINDOW, checked_prompts, context_limit, prompt_names
from megabyte_distill.inference.sampling import Sampling, choose, mask_bytes, mask_padding, uniform_numbers
from megabyte_distill.inference.utf8 import Utf8Mode, Utf8Rows
from megabyte_distill.model.student import Student, StudentState

Step = Callable[[Tensor, Tensor, StudentState], Tensor]
"""(bytes [R], bits [R], state) → joint logits [R, 512] of what comes next; the state is updated."""


class GenerationMode(str, Enum):
    """What is drawn."""

    JOINT = "joint"
    """(byte, bit) pairs: exact samples of the model."""
    BYTES = "bytes"
    """Bytes, their probabilities summed over the bits and over ``paths`` bit histories: the byte model that stock tools
    see in an export. ``paths`` times the work."""


class PromptReading(str, Enum):
    """How a prompt's chunks are found."""

    PATHS = "paths"
    """Its end along ``paths`` bit histories; nothing is forced."""
    OFFICIAL = "official"
    """The paper's way (:class:`OfficialReader`): the router's, and the prompt's last byte ends one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationSettings:
    """What to generate."""

    max_new_bytes: int = 256
    sampling: Sampling = field(default_factory=Sampling)
    paths: int = 4
    """Bit histories along which a prompt's end is read, and kept up in mode BYTES."""
    path_window: int = PATH_WINDOW
    """Length of that end. What stands in front of it is cut where the router cuts, and read many bytes at once."""
    seed: int = 0
    """Row i of a batch draws with seed + i, whatever the other rows are."""
    mode: GenerationMode = GenerationMode.JOINT
    reading: PromptReading = PromptReading.PATHS
    stop: tuple[bytes, ...] = ()
    """A row ends in front of the first of these that it writes. They are looked for in the new bytes alone."""
    utf8: Utf8Mode = Utf8Mode.RAW

    def __post_init__(self) -> None:
        SIZE.require("max_new_bytes", self.max_new_bytes)
        COUNT.require("paths", self.paths)
        COUNT.require("path_window", self.path_window)
        SEED.require("seed", self.seed)
        if isinstance(self.stop, str | bytes) or not all(isinstance(text, bytes) and text for text in self.stop):
            raise ValueError(f"stop is {self.stop!r}; expected a tuple of bytes, none of them empty")
        if self.reading is PromptReading.OFFICIAL and self.mode is GenerationMode.BYTES:
            raise ValueError("the paper's way reads a prompt along one path; it goes with joint generation only")
        if self.sampling.boundary_threshold is not None and self.mode is GenerationMode.BYTES:
            raise ValueError(
                "a boundary threshold decides bits; mode bytes sums over them: leave one out, or generate pairs"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated:
    """One continuation."""

    byte_ids: bytes
    """The new bytes, raw: not always valid UTF-8. BOS, which ends a document, and a stop text are left out."""
    bits: tuple[bool, ...]
    """The new bytes' boundary bits: True where one ends a chunk. In mode BYTES those of the likeliest path."""
    prompt_bits: tuple[bool, ...]
    """The bits of the prompt's bytes, inferred."""
    log_probability: float
    """Of all that was drawn (the ending and a stop text too), in nats under the untempered model."""
    ended: bool
    """True where the model ended the document."""
    stopped_by: bytes | None = None
    """The stop text that ended the row."""
    is_full: bool = False
    """True where the backbone has no position left (its max_position_embeddings, in chunks)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewBytes:
    """One step of the rows that still run."""

    rows: list[int]
    """Which prompts they belong to."""
    byte_ids: list[int]
    """BOS where the document ends; the row is not seen again."""
    bits: list[bool] | None
    """None in mode BYTES, where they are known at the end."""
    log_probabilities: list[float]
    """Of the pairs or bytes, under the untempered model."""


class Cursor(Protocol):
    """Rows that are written on."""

    log_probabilities: Tensor
    """[R, 512] of the next pair, or [R, 256] of the next byte."""

    def advance(self, byte_ids: Tensor, bits: Tensor) -> None:
        """Read one byte [R] and its bit [R] in each row."""

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows [N] int64 only."""

    def positions(self) -> Tensor:
        """[R] positions of the backbone in use."""


class _Pairs:
    """Rows that draw (byte, bit) pairs: one path each."""

    def __init__(self, step: Step, state: StudentState, log_probabilities: Tensor) -> None:
        self._step, self._state = step, state
        self.log_probabilities = log_probabilities
        """[R, 512]."""

    def advance(self, byte_ids: Tensor, bits: Tensor) -> None:
        self.log_probabilities = self._step(byte_ids, bits, self._state).float().log_softmax(-1)

    def keep(self, rows: Tensor) -> None:
        self._state, self.log_probabilities = self._state.select(rows), self.log_probabilities[rows]

    def positions(self) -> Tensor:
        lengths: Tensor = self._state.cache.lengths
        return lengths


class _Bytes:
    """Rows that draw bytes: K paths each, all kept to the end for their histories."""

    def __init__(self, read: BitPaths) -> None:
        self._read = read
        self._rows = torch.arange(read.rows, device=read.log_weights.device)
        self.log_probabilities = read.next_byte_log_probabilities()
        """[R, 256]."""

    def advance(self, byte_ids: Tensor, bits: Tensor) -> None:
        """Read one byte [R] in each row; there are no bits."""
        every = self._rows.shape[0] == self._read.rows
        self._read.advance(byte_ids, None if every else self._rows)
        self.log_probabilities = self._read.next_byte_log_probabilities()[self._rows]

    def keep(self, rows: Tensor) -> None:
        self._rows, self.log_probabilities = self._rows[rows], self.log_probabilities[rows]

    def positions(self) -> Tensor:
        return self._read.positions()[self._rows]


class Continuations:
    """A batch of prompts written on to their ends. Iterate over it once for the new bytes; :meth:`results` tells them
    whole. Whoever derives from it reads the prompts.

    Attributes:
        prompts: as bytes.
        prompt_bits: the segmentation each prompt is continued under.
    """

    prompt_bits: list[tuple[bool, ...]]
    _cursor: Cursor

    def __init__(
        self,
        prompts: Sequence[str | bytes],
        settings: GenerationSettings,
        device: torch.device,
        limit: int | None,
        names: Sequence[str] | None,
        draws: int = 1,
    ) -> None:
        """What is known before the prompts are read; ValueError for no prompts, a bare text, bytes 254 and 255 in one.

        ``limit``: positions of the backbone. ``names``: what messages call the prompts (default: by their numbers).
        ``draws``: numbers that each byte takes; the first of them decides the pair.
        """
        self.prompts = checked_prompts(prompts, names)
        self._names = names or prompt_names(len(prompts))
        self._settings, self._device = settings, device
        count, size = len(self.prompts), settings.max_new_bytes + 1
        self._numbers = uniform_numbers(count, size * draws, settings.seed).to(device).view(count, size, draws)
        self._uniform = self._numbers[:, :, 0]
        longest = max(len(prompt) for prompt in self.prompts)
        self._limit = limit if limit is not None and longest + settings.max_new_bytes >= limit else None
        is_constrained = settings.utf8 is Utf8Mode.CONSTRAIN
        self._utf8 = Utf8Rows(self.prompts, device) if is_constrained else None
        self._rows = [WrittenRow() for _ in self.prompts]

    def __iter__(self) -> Iterator[NewBytes]:
        """One :class:`NewBytes` a step, until every row has ended or ``max_new_bytes`` are there."""
        return self._steps()

    @torch.no_grad()
    def _steps(self) -> Iterator[NewBytes]:
        cursor, rows = self._cursor, torch.arange(len(self.prompts), device=self._device)
        for position in range(1, self._settings.max_new_bytes + 1):
            rows = self._without_full(rows)
            if not rows.shape[0]:
                return
            drawn = choose(self._possible(), self._settings.sampling, self._uniform[rows, position])
            chances = cursor.log_probabilities.gather(1, drawn[:, None])[:, 0]
            byte_ids, bits = split_class(drawn)
            yield self._record(rows.tolist(), byte_ids.tolist(), bits.tolist(), chances.tolist())
            going = self._going(rows)
            if not going.shape[0]:
                return
            if going.shape[0] < rows.shape[0]:
                rows = self._keep(rows, going)
                byte_ids, bits = byte_ids[going], bits[going]
            cursor.advance(byte_ids, bits == 1)
            if self._utf8 is not None:
                self._utf8.read(byte_ids)

    def _without_full(self, rows: Tensor) -> Tensor:
        """The rows for which the backbone has a position left; the others end here."""
        if self._limit is None:
            return rows
        for row in rows[self._cursor.positions() >= self._limit].tolist():
            self._rows[row].is_full = True
        return self._keep(rows, self._going(rows))

    def _possible(self) -> Tensor:
        """Log-probabilities of what may be drawn, [R, 512] or [R, 256]."""
        log_probabilities = self._cursor.log_probabilities
        if self._utf8 is None:
            return mask_padding(log_probabilities)
        return mask_bytes(log_probabilities, self._utf8.allowed())

    def _going(self, rows: Tensor) -> Tensor:
        """Places in ``rows`` [R] of those that have not ended."""
        places = [place for place, row in enumerate(rows.tolist()) if not self._rows[row].is_done]
        return torch.tensor(places, dtype=torch.int64, device=self._device)

    def _keep(self, rows: Tensor, places: Tensor) -> Tensor:
        """The rows at ``places``, with which everything goes on."""
        if places.shape[0] < rows.shape[0]:
            self._cursor.keep(places)
            if self._utf8 is not None:
                self._utf8.keep(places)
        return rows[places]

    def _record(self, rows: list[int], byte_ids: list[int], bits: list[int], chances: list[float]) -> NewBytes:
        for row, byte, bit, chance in zip(rows, byte_ids, bits, chances, strict=True):
            self._rows[row].add(byte, bool(bit), chance, self._settings.stop)
        return NewBytes(
            rows=rows,
            byte_ids=byte_ids,
            bits=None if self._settings.mode is GenerationMode.BYTES else [bit == 1 for bit in bits],
            log_probabilities=chances,
        )

    def results(self) -> list[Generated]:
        """The continuation of each prompt, as far as it has been iterated over."""
        return [
            Generated(
                byte_ids=bytes(row.byte_ids),
                bits=tuple(row.bits),
                prompt_bits=prompt_bits,
                log_probability=row.log_probability,
                ended=row.ended,
                stopped_by=row.stopped_by,
                is_full=row.is_full,
            )
            for row, prompt_bits in zip(self._rows, self.prompt_bits, strict=True)
        ]


class Generation(Continuations):
    """A student's continuations.

    ``prompt_bits``: the likeliest of a prompt's paths when greedy, else one drawn by the paths' posterior (tempered
    like the rest). In mode BYTES, which continues all, the likeliest.
    """

    def __init__(
        self,
        student: Student,
        prompts: Sequence[str | bytes],
        settings: GenerationSettings,
        names: Sequence[str] | None = None,
    ) -> None:
        """ValueError for no prompts, a bare text, bytes 254 and 255 in one, one that is too long, and a student in
        official mode that is to be read along paths. ``names``: what it calls the prompts (default: by number)."""
        super().__init__(prompts, settings, device_of(student), context_limit(student), names)
        if student.is_official and settings.reading is not PromptReading.OFFICIAL:
            raise ValueError(
                "a student with --dechunk-mode official reads one byte ahead and cannot be stepped along paths; "
                "generate in the paper's way (PromptReading.OFFICIAL, --scoring official)"
            )
        self._read: BitPaths | None = None
        with torch.no_grad():
            if settings.reading is PromptReading.OFFICIAL:
                self._begin_official(student)
            else:
                self._begin_along_paths(student)

    def _begin_official(self, student: Student) -> None:
        threshold = self._settings.sampling.boundary_threshold
        threshold = 0.5 if threshold is None else threshold
        reader = OfficialReader(student, self.prompts, threshold=threshold, names=self._names)
        self.prompt_bits = [tuple(bits) for bits in reader.bits]
        self._cursor = _Pairs(reader.step, reader.state, reader.log_probabilities)

    def _begin_along_paths(self, student: Student) -> None:
        settings = self._settings
        read = read_prompts(student, self.prompts, settings.paths, self._names, path_window=settings.path_window)
        if settings.mode is GenerationMode.BYTES:
            self._read, path = read, read.log_weights.argmax(-1)
            self._cursor = _Bytes(read)
        else:
            only_temperature = Sampling(temperature=settings.sampling.temperature)
            path = choose(read.log_weights, only_temperature, self._uniform[:, 0])
            self._cursor = _Pairs(student.step, *read.settle(path))
        self.prompt_bits = [tuple(bits) for bits in read.history(path)]

    def results(self) -> list[Generated]:
        """As far as it has been iterated over; in mode BYTES with the bits of the likeliest path."""
        if self._read is not None:
            histories = self._read.history(self._read.log_weights.argmax(-1))
            self.prompt_bits = [tuple(h[: len(p)]) for h, p in zip(histories, self.prompts, strict=True)]
            for row, history, prompt in zip(self._rows, histories, self.prompts, strict=True):
                size = len(row.byte_ids)
                bits = history[len(prompt) :][:size]
                row.bits = bits + [False] * (size - len(bits))  # in the middle of a step the last byte is not read yet
        return super().results()


@dataclass
class WrittenRow:
    """What one row has written."""

    byte_ids: bytearray = field(default_factory=bytearray)
    bits: list[bool] = field(default_factory=list)
    log_probability: float = 0.0
    ended: bool = False
    stopped_by: bytes | None = None
    is_full: bool = False

    @property
    def is_done(self) -> bool:
        """True where nothing more may be written."""
        return self.ended or self.stopped_by is not None or self.is_full

    def add(self, byte: int, bit: bool, chance: float, stop: tuple[bytes, ...]) -> None:
        """One more byte; a stop text is taken off again (the longest, where several end here)."""
        self.log_probability += chance
        if byte == BOS_BYTE:
            self.ended = True
            return
        self.byte_ids.append(byte)
        self.bits.append(bit)
        self.stopped_by = max((text for text in stop if self.byte_ids.endswith(text)), key=len, default=None)
        if self.stopped_by is not None:
            del self.byte_ids[-len(self.stopped_by) :], self.bits[-len(self.stopped_by) :]

    def settled(self, stop: tuple[bytes, ...]) -> int:
        """How many of the bytes cannot be part of a stop text that is still to come."""
        begun = (size for text in stop for size in range(1, len(text)) if self.byte_ids.endswith(text[:size]))
        return len(self.byte_ids) - max(begun, default=0)


def generate(
    student: Student, prompts: Sequence[str | bytes], settings: GenerationSettings | None = None
) -> list[Generated]:
    """The continuation of each prompt; errors as :class:`Generation`."""
    running = Generation(student, prompts, settings or GenerationSettings())
    for _ in running:
        pass
    return running.results()


def complete_characters(new_bytes: Iterable[int], begun: bytes = b"", errors: str = "replace") -> Iterator[str]:
    """Text as soon as its characters are complete. Never yields "".

    ``begun``: what came before; a character it leaves open is finished by the new bytes and shown whole. ``errors``:
    as Python's decoders have it; what becomes of bytes that are no UTF-8 (U+FFFD).
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors)
    decoder.decode(begun)
    for byte in new_bytes:
        text = decoder.decode(bytes([byte]))
        if text:
            yield text
    rest = decoder.decode(b"", final=True)
    if rest:
        yield rest


def new_pairs(steps: Iterable[NewBytes], stop: tuple[bytes, ...] = ()) -> Iterator[tuple[int, bool]]:
    """(byte, bit) of the steps of one prompt's continuation, as they come; bits that are not known are False.

    What may turn out to begin a ``stop`` text is held back, and a stop text never shows.
    """
    row, shown = WrittenRow(), 0
    for new in steps:
        bits = new.bits or [False] * len(new.byte_ids)
        for byte, bit, chance in zip(new.byte_ids, bits, new.log_probabilities, strict=True):
            row.add(byte, bit, chance, stop)
        size = len(row.byte_ids) if row.is_done else row.settled(stop)
        yield from zip(row.byte_ids[shown:size], row.bits[shown:size], strict=True)
        shown = size
    yield from zip(row.byte_ids[shown:], row.bits[shown:], strict=True)


def new_bytes(steps: Iterable[NewBytes], stop: tuple[bytes, ...] = ()) -> Iterator[int]:
    """The bytes of :func:`new_pairs`."""
    return (byte for byte, _ in new_pairs(steps, stop))


def stream(student: Student, prompt: str | bytes, settings: GenerationSettings | None = None) -> Iterator[str]:
    """The continuation of one prompt, character by character (:func:`complete_characters`). Errors come at the call."""
    settings = settings or GenerationSettings()
    running = Generation(student, [prompt], settings)
    return complete_characters(new_bytes(running, settings.stop), running.prompts[0])
