"""Raw documents from text files: which files, their lines in batches, and their hashes on the way."""

from __future__ import annotations

import glob
import gzip
import hashlib
import io
import lzma
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from typing import IO, cast

_BATCH_BYTES = 1 << 20
_BATCH_DOCUMENTS = 2000


class InputFormat(Enum):
    """What a file's lines mean."""

    JSON_LINES = auto()
    """A JSON object a line; blank lines are skipped."""
    TEXT = auto()
    """The whole file is one document."""


@dataclass(frozen=True, slots=True)
class RawBatch:
    """Consecutive raw documents of one file."""

    path: str
    format: InputFormat
    first_line: int
    """Line number of the first one, counted from 1."""
    records: tuple[bytes, ...]

    def where(self, index: int) -> str:
        """File and line of a record, for messages."""
        return self.path if self.format is InputFormat.TEXT else f"{self.path}, line {self.first_line + index}"


def expand_inputs(patterns: Sequence[str | Path]) -> list[Path]:
    """Files behind paths and globs, in the order given, each glob sorted. ValueError where one matches nothing."""
    files: list[Path] = []
    for pattern in map(str, patterns):
        found = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern, recursive=True))
        found = [path for path in found if Path(path).is_file()]
        if not found:
            raise ValueError(f"--input {pattern}: no such file")
        files.extend(Path(path) for path in found)
    for file in files:
        input_format(file)
    return files


def input_format(path: Path) -> InputFormat:
    """By the file name, under .gz or .xz; ValueError for another ending."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    ending = suffixes[-2] if len(suffixes) > 1 and suffixes[-1] in (".gz", ".xz") else "".join(suffixes[-1:])
    if ending in (".jsonl", ".json"):
        return InputFormat.JSON_LINES
    if ending == ".txt":
        return InputFormat.TEXT
    raise ValueError(f"{path}: unknown kind of input; expected .jsonl or .txt, plain, .gz or .xz")


class _HashedFile(io.RawIOBase):
    """A file that hashes what is read from it, so that hashing costs no second pass over the disk."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115  closed with this object
        self.digest = hashlib.sha256()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        count = self._file.readinto(buffer)
        self.digest.update(memoryview(buffer)[:count])
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def read_batches(path: Path, hashes: dict[str, str]) -> Iterator[RawBatch]:
    """The documents of one file; at its end ``hashes[path]`` holds the sha256 of the file as it lies on the disk.

    ValueError names the file where it cannot be read or its compression is broken.
    """
    kind = input_format(path)
    try:
        raw = _HashedFile(path)
        with raw, io.BufferedReader(raw, 1 << 20) as plain, _decompressed(cast(IO[bytes], plain), path) as stream:
            if kind is InputFormat.TEXT:
                yield RawBatch(str(path), kind, 1, (stream.read(),))
            else:
                yield from _lines(stream, str(path))
            while plain.read(1 << 20):  # what a decompressor leaves behind belongs to the file's hash
                pass
            hashes[str(path)] = raw.digest.hexdigest()
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise ValueError(f"{path}: cannot be read to its end ({error}): damaged or truncated") from error


def _decompressed(stream: IO[bytes], path: Path) -> IO[bytes]:
    if path.suffix.lower() == ".gz":
        return cast(IO[bytes], gzip.GzipFile(fileobj=stream))
    if path.suffix.lower() == ".xz":
        return cast(IO[bytes], lzma.LZMAFile(stream))
    return stream


def _lines(stream: IO[bytes], path: str) -> Iterator[RawBatch]:
    records: list[bytes] = []
    size, first = 0, 1
    for number, line in enumerate(stream, start=1):
        records.append(line)
        size += len(line)
        if size >= _BATCH_BYTES or len(records) >= _BATCH_DOCUMENTS:
            yield RawBatch(path, InputFormat.JSON_LINES, first, tuple(records))
            records, size, first = [], 0, number + 1
    if records:
        yield RawBatch(path, InputFormat.JSON_LINES, first, tuple(records))
