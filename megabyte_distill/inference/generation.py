"""Plain joint generation: one (byte, bit) pair of each row at a time. A faster engine must give the same bytes."""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megabyte_distill.alphabet import BOS_BYTE, split_class
from megabyte_distill.inference.bit_paths import BitPaths, device_of
from megabyte_distill.inference.prompts import prompt_bytes
from megabyte_distill.inference.sampling import Sampling, choose, mask_padding, uniform_numbers
from megabyte_distill.model.student import Student, StudentState


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationSettings:
    """What to generate."""

    max_new_bytes: int = 256
    sampling: Sampling = field(default_factory=Sampling)
    paths: int = 4
    """Bit histories along which a prompt is read."""
    seed: int = 0
    """Row i of a batch draws with seed + i, whatever the other rows are."""
    stop: tuple[bytes, ...] = ()
    """A row stops behind the first of these that its new bytes end with."""

    def __post_init__(self) -> None:
        if self.max_new_bytes < 0:
            raise ValueError(f"max_new_bytes is {self.max_new_bytes}; expected a whole number of at least 0")
        if self.paths < 1:
            raise ValueError(f"paths is {self.paths}; expected at least 1")
        if not 0 <= self.seed < 2**62:
            raise ValueError(f"seed is {self.seed}; expected a whole number from 0 to 2^62")
        if any(not isinstance(text, bytes) or not text for text in self.stop):
            raise ValueError(f"stop is {self.stop!r}; expected a tuple of byte strings, none of them empty")


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated:
    """One continuation."""

    byte_ids: bytes
    """The new bytes, raw: not always valid UTF-8. BOS, which ends a document, is left out."""
    bits: tuple[bool, ...]
    """The new bytes' boundary bits: True where one ends a chunk."""
    prompt_bits: tuple[bool, ...]
    """The bits of the prompt's bytes, inferred."""
    log_probability: float
    """Of the new pairs, and of the ending where there is one, in nats under the untempered model."""
    ended: bool
    """True where the model ended the document; False where a stop string or max_new_bytes did."""
    stopped: bool = False
    """True where a stop string did; ``byte_ids`` end with it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewBytes:
    """One step of the rows that still run."""

    rows: list[int]
    """Which prompts they belong to."""
    byte_ids: list[int]
    """BOS where the document ends; the row is not seen again."""
    bits: list[bool]
    log_probabilities: list[float]
    """Of the pairs, under the untempered model."""


class Generation:
    """A batch of prompts read to their ends. Iterate over it once for the new bytes.

    Attributes:
        prompts: as bytes.
        prompt_bits: the segmentation each prompt is continued under: the likeliest of its paths when greedy, else one
            drawn by the paths' posterior (tempered like the rest). Nothing is forced.
    """

    def __init__(self, student: Student, prompts: Sequence[str | bytes], settings: GenerationSettings) -> None:
        """ValueError for no prompts, a bare text, bytes 254 and 255 in one, and a student in official mode."""
        self.prompts = checked_prompts(prompts)
        self._student, self._settings = student, settings
        device = device_of(student)
        self._uniform = uniform_numbers(len(prompts), settings.max_new_bytes + 1, settings.seed).to(device)
        with torch.no_grad():
            read = read_prompts(student, self.prompts, settings.paths)
            only_temperature = Sampling(temperature=settings.sampling.temperature)
            path = choose(read.log_weights, only_temperature, self._uniform[:, 0])
            self.prompt_bits = [tuple(bits) for bits in read.history(path)]
            self._state, self._log_probabilities = read.settle(path)

    def __iter__(self) -> Iterator[NewBytes]:
        """One :class:`NewBytes` a step, until every row has ended or ``max_new_bytes`` are there."""
        state, log_probabilities, uniform = self._state, self._log_probabilities, self._uniform
        rows = torch.arange(len(self.prompts), device=uniform.device)
        tails = [b""] * len(self.prompts)  # as much of each row's new bytes as a stop string may span
        for position in range(1, self._settings.max_new_bytes + 1):
            joint = choose(mask_padding(log_probabilities), self._settings.sampling, uniform[:, position])
            byte_ids, bits = split_class(joint)
            yield NewBytes(
                rows=rows.tolist(),
                byte_ids=byte_ids.tolist(),
                bits=(bits == 1).tolist(),
                log_probabilities=log_probabilities.gather(1, joint[:, None])[:, 0].tolist(),
            )
            stopped = self._stopped(rows.tolist(), byte_ids.tolist(), tails)
            running = ((byte_ids != BOS_BYTE) & ~torch.tensor(stopped, device=rows.device)).nonzero()[:, 0]
            if not running.shape[0]:
                return
            if running.shape[0] < rows.shape[0]:
                rows, uniform, byte_ids, bits = rows[running], uniform[running], byte_ids[running], bits[running]
                state = state.select(running)
            log_probabilities = self._step(byte_ids, bits == 1, state)

    def _stopped(self, rows: list[int], byte_ids: list[int], tails: list[bytes]) -> list[bool]:
        longest = max(map(len, self._settings.stop), default=0)
        for row, byte in zip(rows, byte_ids, strict=True):
            tails[row] = (tails[row] + bytes([byte]))[-longest:] if longest else b""
        return [tails[row].endswith(self._settings.stop) for row in rows]

    def _step(self, byte_ids: Tensor, bits: Tensor, state: StudentState) -> Tensor:
        return self._student.step(byte_ids, bits, state).float().log_softmax(-1)


def checked_prompts(prompts: Sequence[str | bytes]) -> list[bytes]:
    """Their bytes. ValueError for none, a bare text, and bytes 254 and 255 in one."""
    if isinstance(prompts, str | bytes):
        raise ValueError("prompts is one text, whose letters would be read as prompts; put it into a list")
    if not prompts:
        raise ValueError("no prompts; expected at least one, which may be empty")
    names = ["prompt"] if len(prompts) == 1 else [f"prompt {number}" for number in range(len(prompts))]
    return [prompt_bytes(prompt, name) for prompt, name in zip(prompts, names, strict=True)]


def read_prompts(student: Student, prompts: Sequence[bytes], paths: int) -> BitPaths:
    """Reads prompts of any lengths along K paths; row i of the result stands behind prompt i's last byte."""
    device = device_of(student)
    read = BitPaths(student, len(prompts), paths, keep_history=True)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    longest = int(lengths.max())
    padded = torch.tensor([list(prompt.ljust(longest, b"\0")) for prompt in prompts], dtype=torch.int64, device=device)
    shortest = int(lengths.min())
    for position in range(longest):
        rows = None if position < shortest else (lengths > position).nonzero()[:, 0]
        column = padded[:, position]
        read.advance(column if rows is None else column[rows], rows)
    return read


def generate(
    student: Student, prompts: Sequence[str | bytes], settings: GenerationSettings | None = None
) -> list[Generated]:
    """The continuation of each prompt; errors as :class:`Generation`."""
    settings = settings or GenerationSettings()
    running = Generation(student, prompts, settings)
    bytes_of: list[bytearray] = [bytearray() for _ in prompts]
    bits_of: list[list[bool]] = [[] for _ in prompts]
    total = [0.0] * len(prompts)
    ended = [False] * len(prompts)
    for new in running:
        for row, byte, bit, logp in zip(new.rows, new.byte_ids, new.bits, new.log_probabilities, strict=True):
            total[row] += logp
            if byte == BOS_BYTE:
                ended[row] = True
            else:
                bytes_of[row].append(byte)
                bits_of[row].append(bit)
    return [
        Generated(
            byte_ids=bytes(bytes_of[row]),
            bits=tuple(bits_of[row]),
            prompt_bits=running.prompt_bits[row],
            log_probability=total[row],
            ended=ended[row],
            stopped=not ended[row] and bytes(bytes_of[row]).endswith(settings.stop),
        )
        for row in range(len(prompts))
    ]


def complete_characters(new_bytes: Iterator[int], begun: bytes = b"") -> Iterator[str]:
    """Text as soon as its characters are complete; bytes that are no UTF-8 become U+FFFD. Never yields "".

    ``begun``: what came before; a character it leaves open is finished by the new bytes and shown whole.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(begun)
    for byte in new_bytes:
        text = decoder.decode(bytes([byte]))
        if text:
            yield text
    rest = decoder.decode(b"", final=True)
    if rest:
        yield rest


def new_bytes(running: Generation) -> Iterator[int]:
    """The bytes that continue the one prompt of a generation, as they come."""
    return (step.byte_ids[0] for step in running if step.byte_ids[0] != BOS_BYTE)


def stream(student: Student, prompt: str | bytes, settings: GenerationSettings | None = None) -> Iterator[str]:
    """The continuation of one prompt, character by character (:func:`complete_characters`). Errors come at the call."""
    running = Generation(student, [prompt], settings or GenerationSettings())
    return complete_characters(new_bytes(running), running.prompts[0])
