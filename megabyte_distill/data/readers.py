"""Raw records from files, in batches that a worker takes whole; nothing is decoded here that a worker can decode."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import IO, Any

from megabyte_distill.data.compressed import BLOCK_BYTES, HashedFile, blocks, opened
from megabyte_distill.data.inputs import InputFile, InputFormat
from megabyte_distill.optional import require_pyarrow

_BATCH_DOCUMENTS = 4000
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
        with opened(file) as (raw, stream):
            if file.is_one_document:
                waiting.append((file.name, b"".join(blocks(stream))))
                if len(waiting) >= _BATCH_DOCUMENTS or sum(len(text) for _, text in waiting) >= BLOCK_BYTES:
                    yield _whole_files(waiting)
                    waiting = []
            else:
                if waiting:
                    yield _whole_files(waiting)
                    waiting = []
                for batch in _reader(file)(file, stream, keys):
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


def _reader(file: InputFile) -> Callable[[InputFile, IO[bytes], Sequence[str]], Iterator[RawBatch]]:
    if file.format is InputFormat.PARQUET:
        return _parquet_rows
    if file.format is InputFormat.JSON:
        return _json
    return _lines


def _lines(file: InputFile, stream: IO[bytes], keys: Sequence[str]) -> Iterator[RawBatch]:
    return _line_batches(file, blocks(stream))


def _line_batches(file: InputFile, pieces: Iterable[bytes]) -> Iterator[RawBatch]:
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


def _json(file: InputFile, stream: IO[bytes], keys: Sequence[str]) -> Iterator[RawBatch]:
    """An array where the first character is a bracket, else an object a line."""
    pieces = blocks(stream)
    head = b""
    for piece in pieces:
        head += piece
        if head.strip():
            break
    if not head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        yield from _line_batches(file, _chained(head, pieces))
        return
    records: list[bytes] = []
    size, first = 0, 1
    for number, element in enumerate(_array_elements(file, _chained(head, pieces)), start=1):
        records.append(element)
        size += len(element)
        if size >= BLOCK_BYTES or len(records) >= _BATCH_DOCUMENTS:
            yield _elements(file, first, records)
            records, size, first = [], 0, number + 1
    if records:
        yield _elements(file, first, records)


def _elements(file: InputFile, first: int, records: list[bytes]) -> RawBatch:
    return RawBatch(kind=RecordKind.JSON, names=(file.name,), first=first, unit="element", records=tuple(records))


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
                raise ValueError(f"{file.name}, element {number}: {_OPEN_ARRAY}")
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


def _parquet_rows(file: InputFile, stream: IO[bytes], keys: Sequence[str]) -> Iterator[RawBatch]:
    """The keys' columns, whatever string type they have, as bytes."""
    if file.is_stdin or not hasattr(stream, "seek"):
        raise ValueError(f"{file.name}: a parquet file is read from its end; give it uncompressed and by its path")
    arrow, parquet = require_pyarrow(file.name)
    try:
        table = parquet.ParquetFile(file.path)
        names = table.schema_arrow.names
        missing = [key for key in keys if key not in names]
        if missing:
            raise ValueError(f"{file.name}: no column {missing[0]!r}; it has {', '.join(map(repr, names))}")
        first = 1
        for part in table.iter_batches(batch_size=_BATCH_DOCUMENTS // 4, columns=list(dict.fromkeys(keys))):
            columns = [_text_column(arrow, part, key, file) for key in keys]
            yield RawBatch(
                kind=RecordKind.COLUMNS,
                names=(file.name,),
                first=first,
                unit="row",
                records=tuple(zip(*columns, strict=True)),
            )
            first += part.num_rows
    except arrow.ArrowException as error:
        raise ValueError(f"{file.name}: cannot be read as parquet ({error}): damaged or truncated") from error


def _text_column(arrow: Any, part: Any, key: str, file: InputFile) -> list[bytes | None]:
    column = part.column(key)
    if arrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    kinds = ("is_string", "is_large_string", "is_binary", "is_large_binary")
    if not any(getattr(arrow.types, kind)(column.type) for kind in kinds):
        raise ValueError(f"{file.name}: column {key!r} is {column.type}, expected text")
    return column.cast(arrow.large_binary()).to_pylist()  # type: ignore[no-any-return]
