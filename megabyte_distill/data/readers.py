"""Raw records from files, in batches that a worker takes whole; nothing is decoded here that a worker can decode."""

from __future__ import annotations

import codecs
import contextlib
import io
import json
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

from megabyte_distill.data.compressed import BLOCK_BYTES, HashedFile, blocks, opened
from megabyte_distill.data.inputs import Compression, InputFile, InputFormat
from megabyte_distill.optional import require_pyarrow

_BATCH_DOCUMENTS = 4000
_PARQUET_ROWS = 256
"""Decoded at a time, at most: a dictionary page may hide how long they are."""
_PARQUET_SLICE = 32
"""Rows of these that are made Python objects at a time, where they are long."""
_JSON_SPACE = " \t\r\n"
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
    lines: bytes | None = None
    """Records that are lines, newlines and all; or else"""
    records: tuple[Payload, ...] = ()

    def payloads(self) -> Sequence[Payload]:
        """The records; lines without their newline."""
        if self.lines is None:
            return self.records
        lines = self.lines.split(b"\n")
        if not lines[-1]:
            lines.pop()
        return lines

    def where(self, index: int) -> str:
        """File and number of a record, for messages."""
        if len(self.names) == 1 and not self.is_whole_files:
            return f"{self.names[0]}, {self.unit} {self.first + index}"
        return self.names[index]

    @property
    def is_whole_files(self) -> bool:
        """True where each record is a file."""
        return self.kind is RecordKind.TEXT and self.lines is None


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


def read_batches(files: Iterable[InputFile], keys: Sequence[str], progress: ReadProgress) -> Iterator[RawBatch]:
    """The records of all files in order. ValueError names a file that is damaged or cannot be read."""
    waiting: list[tuple[str, bytes]] = []
    for file in files:
        before = progress.raw_bytes
        with opened(file) as (raw, plain, stream):
            if file.is_one_document:
                waiting.append((file.name, b"".join(blocks(stream, may_wait=file.may_wait))))
                if len(waiting) >= _BATCH_DOCUMENTS or sum(len(text) for _, text in waiting) >= BLOCK_BYTES:
                    yield _whole_files(waiting)
                    waiting = []
            else:
                if waiting:
                    yield _whole_files(waiting)
                    waiting = []
                if file.format is InputFormat.PARQUET:
                    batches = _parquet(file, plain, keys)
                else:
                    read = _json if file.format is InputFormat.JSON else _line_batches
                    batches = read(file, blocks(stream, may_wait=file.may_wait))
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


def _line_batches(file: InputFile, pieces: Iterable[bytes]) -> Generator[RawBatch, None, None]:
    """About a MiB of whole lines at a time; a longer line is a batch of its own."""
    kind = RecordKind.TEXT if file.format is InputFormat.TEXT else RecordKind.JSON
    rest: list[bytes] = []
    first = 1
    for piece in pieces:
        cut = piece.rfind(b"\n") + 1
        if not cut:
            rest.append(piece)
            continue
        rest.append(piece[:cut])
        lines = b"".join(rest)
        yield RawBatch(kind=kind, names=(file.name,), first=first, lines=lines)
        first += lines.count(b"\n")
        rest = [piece[cut:]]
    lines = b"".join(rest)
    if lines:
        yield RawBatch(kind=kind, names=(file.name,), first=first, lines=lines)


def _json(file: InputFile, pieces: Iterator[bytes]) -> Generator[RawBatch, None, None]:
    """An array where the first character is a bracket, else an object a line."""
    head = b""
    for piece in pieces:
        head += piece
        if head.strip():
            break
    if not head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        yield from _line_batches(file, _chained(head, pieces))
        return
    elements = ((element, len(element)) for element in _array_elements(file, _chained(head, pieces)))
    yield from _gathered(file, RecordKind.JSON, "element", elements)


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


def _chained(head: bytes, pieces: Iterable[bytes]) -> Iterator[bytes]:
    yield head
    yield from pieces


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


def _parquet(file: InputFile, plain: io.BufferedReader[Any], keys: Sequence[str]) -> Generator[RawBatch, None, None]:
    """The keys' columns, whatever string type they have, as bytes."""
    if file.may_wait or file.compression is not Compression.NONE:
        raise ValueError(f"{file.name}: a parquet file is read from its end; give it uncompressed and by its path")
    arrow, parquet = require_pyarrow(file.name)
    try:
        with parquet.ParquetFile(file.path, buffer_size=BLOCK_BYTES) as table:
            names = table.schema_arrow.names
            missing = [key for key in keys if key not in names]
            if missing:
                raise ValueError(f"{file.name}: no column {missing[0]!r}; it has {', '.join(map(repr, names))}")
            yield from _gathered(file, RecordKind.COLUMNS, "row", _parquet_rows(arrow, table, file, plain, keys))
    except arrow.ArrowException as error:
        raise ValueError(f"{file.name}: cannot be read as parquet ({error}): damaged or truncated") from error


def _parquet_rows(
    arrow: Any, table: Any, file: InputFile, plain: io.BufferedReader[Any], keys: Sequence[str]
) -> Iterator[tuple[Payload, int]]:
    """Rows with their sizes; ``plain``, which hashes and counts, follows at the pace of the row groups."""
    behind = followed = 0
    for group in range(table.num_row_groups):
        stored = table.metadata.row_group(group)
        columns = [stored.column(index) for index in range(stored.num_columns)]
        size = sum(column.total_uncompressed_size for column in columns if column.path_in_schema in keys)
        rows = max(1, min(_PARQUET_ROWS, BLOCK_BYTES * stored.num_rows // max(size, 1)))
        wanted = list(dict.fromkeys(keys))
        compressed, done = sum(column.total_compressed_size for column in columns), 0
        for part in table.iter_batches(batch_size=rows, row_groups=[group], columns=wanted):
            step = _PARQUET_ROWS if part.nbytes <= 4 * BLOCK_BYTES else _PARQUET_SLICE
            for start in range(0, part.num_rows, step):
                texts = [_text_column(arrow, part.slice(start, step), key, file) for key in keys]
                for row in zip(*texts, strict=True):
                    yield row, sum(map(len, filter(None, row)))
            done += part.num_rows
            place = behind + compressed * done // max(stored.num_rows, 1)
            while followed < place and (piece := plain.read(min(place - followed, BLOCK_BYTES))):
                followed += len(piece)
        behind += compressed


def _text_column(arrow: Any, part: Any, key: str, file: InputFile) -> list[bytes | None]:
    column = part.column(key)
    if arrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    kinds = ("is_string", "is_large_string", "is_binary", "is_large_binary")
    if not any(getattr(arrow.types, kind)(column.type) for kind in kinds):
        raise ValueError(f"{file.name}: column {key!r} is {column.type}, expected text")
    return column.cast(arrow.large_binary()).to_pylist()  # type: ignore[no-any-return]
