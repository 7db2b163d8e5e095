"""Raw records from files, in batches that a worker takes whole; nothing is decoded here that a worker can decode."""

from __future__ import annotations

import codecs
import contextlib
import json
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from itertools import chain
from typing import Any

import numpy as np

from megabyte_distill.data.compressed import BLOCK_BYTES, HashedFile, blocks, opened
from megabyte_distill.data.inputs import InputFile, InputFormat
from megabyte_distill.data.parquet_rows import parquet_rows

_BATCH_DOCUMENTS = 4000
_JSON_SPACE = " \t\r\n"
_NEWLINE = 10
_LONGEST_WORD = 16
"""Of JSON, such as -Infinity or an escaped surrogate pair: an error nearer to the end may be a cut."""
_OPEN_ARRAY = "the array ends without its closing bracket: damaged or truncated"


class RecordKind(Enum):
    """What the payloads of a batch are."""

    JSON = auto()
    """Bytes of one JSON value."""
    TEXT = auto()
    """Bytes of a document."""
    COLUMNS = auto()
    """A tuple of bytes or None, one a key."""


Payload = bytes | tuple[bytes | None, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RawBatch:
    """Consecutive raw records, of one file unless they are whole files."""

    kind: RecordKind
    names: tuple[str, ...]
    """The file; or one name a record, where records are whole files."""
    first: int = 1
    """Number of the first record in its file, counted from 1."""
    unit: str = "line"
    """What is counted: line, element or row."""
    pieces: tuple[bytes, ...] = ()
    """Records that are lines, newlines and all, in pieces that the worker joins; or else"""
    records: tuple[Payload, ...] = ()

    def lines(self) -> bytes:
        """Records that are lines, newlines and all; b"" where they are not."""
        return b"".join(self.pieces)

    def payloads(self) -> Sequence[Payload]:
        """The records; lines without their newline."""
        if not self.pieces:
            return self.records
        lines = self.lines().split(b"\n")
        if not lines[-1]:
            lines.pop()
        return lines

    def where(self, index: int) -> str:
        """File and number of a record, for messages."""
        if len(self.names) == 1 and not self.is_whole_files:
            return f"{self.names[0]}, {self.unit} {self.first + index}"
        return self.names[index]

    def size(self) -> int:
        """Bytes of all records."""
        if self.pieces:
            return sum(map(len, self.pieces))
        texts = (record if isinstance(record, tuple) else (record,) for record in self.records)
        return sum(len(text) for record in texts for text in record if text is not None)

    @property
    def is_whole_files(self) -> bool:
        """True where each record is a file."""
        return self.kind is RecordKind.TEXT and not self.pieces


@dataclass(slots=True)
class ReadProgress:
    """What has been read, for the progress bar and the manifest."""

    raw_bytes: int = 0
    """As they lie on the disk."""
    finished: list[dict[str, Any]] = field(default_factory=list)
    """Path, bytes and sha256 of each file that was read to its end."""

    def finish(self, file: InputFile, raw: HashedFile) -> None:
        """Note a file that was read to its end."""
        self.finished.append({"path": file.path, "bytes": raw.count, "sha256": raw.hexdigest()})


def read_batches(
    files: Iterable[InputFile], keys: Sequence[str], progress: ReadProgress
) -> Generator[RawBatch, None, None]:
    """The records of all files in order. ValueError names a file that is damaged or cannot be read."""
    waiting: list[tuple[str, bytes]] = []
    held = 0
    for file in files:
        before = progress.raw_bytes
        if waiting and (held >= BLOCK_BYTES or len(waiting) >= _BATCH_DOCUMENTS or not file.is_one_document):
            yield _whole_files(waiting)
            waiting, held = [], 0
        with opened(file) as (raw, plain, stream):
            if file.is_one_document:
                text = b"".join(chain.from_iterable(blocks(stream)))
                waiting.append((file.name, text))
                held += len(text)
            else:
                if file.format is InputFormat.PARQUET:
                    batches = _gathered(file, RecordKind.COLUMNS, "row", parquet_rows(file, plain, keys))
                else:
                    split = _json if file.format is InputFormat.JSON else _line_batches
                    batches = split(file, blocks(stream))
                with contextlib.closing(batches):
                    for batch in batches:
                        progress.raw_bytes = before + raw.count
                        yield batch
        progress.raw_bytes = before + raw.count
        progress.finish(file, raw)
    if waiting:
        yield _whole_files(waiting)


def _whole_files(files: Sequence[tuple[str, bytes]]) -> RawBatch:
    return RawBatch(
        kind=RecordKind.TEXT, names=tuple(name for name, _ in files), records=tuple(text for _, text in files)
    )


def _line_batches(file: InputFile, read: Iterable[Sequence[bytes]]) -> Generator[RawBatch, None, None]:
    """About a MiB of whole lines at a time; a longer line is a batch of its own."""
    kind = RecordKind.TEXT if file.format is InputFormat.TEXT else RecordKind.JSON
    rest: list[bytes] = []
    first = 1
    for pieces in read:
        last = next((place for place, piece in reversed(list(enumerate(pieces))) if b"\n" in piece), None)
        if last is None:
            rest += pieces
            continue
        cut = pieces[last].rfind(b"\n") + 1
        lines = (*rest, *pieces[:last], pieces[last][:cut])
        yield RawBatch(kind=kind, names=(file.name,), first=first, pieces=lines)
        first += sum(int(np.count_nonzero(np.frombuffer(piece, dtype=np.uint8) == _NEWLINE)) for piece in lines)
        rest = [piece for piece in (pieces[last][cut:], *pieces[last + 1 :]) if piece]
    if rest:
        yield RawBatch(kind=kind, names=(file.name,), first=first, pieces=tuple(rest))


def _json(file: InputFile, read: Iterator[Sequence[bytes]]) -> Generator[RawBatch, None, None]:
    """An array where the first character is a bracket, else an object a line."""
    head: list[bytes] = []
    for pieces in read:
        head += pieces
        if any(piece.strip() for piece in pieces):
            break
    whole = chain([head], read)
    if b"".join(head).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        elements = ((element, len(element)) for element in _array_elements(file, chain.from_iterable(whole)))
        yield from _gathered(file, RecordKind.JSON, "element", elements)
    else:
        yield from _line_batches(file, whole)


def _gathered(
    file: InputFile, kind: RecordKind, unit: str, sized: Iterable[tuple[Payload, int]]
) -> Generator[RawBatch, None, None]:
    """Batches of about a MiB, or of many records, from records with their sizes in bytes."""
    records: list[Payload] = []
    size, first = 0, 1
    for number, (record, record_size) in enumerate(sized, start=1):
        records.append(record)
        size += record_size
        if size >= BLOCK_BYTES or len(records) >= _BATCH_DOCUMENTS:
            yield RawBatch(kind=kind, names=(file.name,), first=first, unit=unit, records=tuple(records))
            records, size, first = [], 0, number + 1
    if records:
        yield RawBatch(kind=kind, names=(file.name,), first=first, unit=unit, records=tuple(records))


def _array_elements(file: InputFile, pieces: Iterator[bytes]) -> Iterator[bytes]:
    """The source text of each element of one JSON array, with no more than an element and a piece in memory.

    Bytes that are no UTF-8 are carried through as they are: whoever parses the element judges them.
    """
    decoder, scanner = codecs.getincrementaldecoder("utf-8")("surrogateescape"), json.JSONDecoder(strict=False)
    text, place, number, is_open = "", 0, 0, False

    def more() -> bool:
        nonlocal text, place
        piece = next(pieces, None)
        text, place = text[place:] + decoder.decode(piece or b"", final=piece is None), 0
        return piece is not None

    def skip(characters: str) -> str:
        """Moves on to the next character that is none of these; "" at the end of the file."""
        nonlocal place
        while True:
            while place < len(text) and text[place] in characters:
                place += 1
            if place < len(text):
                return text[place]
            if not more():
                return text[place : place + 1]

    skip(_JSON_SPACE + "\ufeff")
    place += 1  # the bracket
    while (character := skip(_JSON_SPACE)) != "]":
        if not character:
            raise ValueError(f"{file.name}: {_OPEN_ARRAY}")
        if is_open:
            if character != ",":
                raise ValueError(f"{file.name}, behind element {number}: expected a comma or ], got {character!r}")
            place += 1
            skip(_JSON_SPACE)
        number += 1
        while (end := _value_end(scanner, text, place, f"{file.name}, element {number}")) is None:
            wanted = 2 * (len(text) - place)
            if not more():
                raise ValueError(f"{file.name}, element {number}: {_why_unfinished(scanner, text)}")
            while len(text) - place < wanted and more():
                pass
        yield text[place:end].encode("utf-8", "surrogateescape")
        place, is_open = end, True
    place += 1
    if behind := skip(_JSON_SPACE):
        raise ValueError(f"{file.name}: {behind!r} behind the array's closing bracket")


def _value_end(scanner: json.JSONDecoder, text: str, place: int, where: str) -> int | None:
    """Where the JSON value at ``place`` ends; None where more text is needed to say. ValueError for what is no JSON."""
    try:
        end = scanner.raw_decode(text, place)[1]
    except json.JSONDecodeError as error:
        if error.msg.startswith("Unterminated string") or error.pos >= len(text) - _LONGEST_WORD:
            return None
        raise ValueError(f"{where}: invalid JSON ({error.msg})") from error
    except RecursionError as error:
        raise ValueError(f"{where}: invalid JSON ({error})") from error
    return end if end < len(text) else None  # a number may go on


def _why_unfinished(scanner: json.JSONDecoder, text: str) -> str:
    """What is wrong with an element that begins ``text`` and does not end before the file does."""
    text = text.rstrip(_JSON_SPACE)
    try:
        scanner.raw_decode(text)
    except json.JSONDecodeError as error:
        if error.pos < len(text) and not error.msg.startswith("Unterminated string"):
            return f"invalid JSON ({error.msg})" + ("" if text.endswith("]") else f"; {_OPEN_ARRAY}")
    return _OPEN_ARRAY
