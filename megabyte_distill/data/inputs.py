"""Which files a corpus is made of, what their records are, and how they are compressed."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

STDIN = "-"


class InputFormat(StrEnum):
    """How a file holds its documents."""

    AUTO = "auto"
    """By the file's ending; standard input is jsonl."""
    JSONL = "jsonl"
    """A JSON object a line; blank lines are skipped."""
    JSON = "json"
    """One array of objects, or a JSON object a line: decided by the first character."""
    TEXT = "txt"
    """Plain text: a document a file, or a line."""
    PARQUET = "parquet"
    """Columns named like the keys."""


class TextDocuments(StrEnum):
    """What a plain text file is."""

    FILE = "file"
    """One document."""
    LINE = "line"
    """A document a line, without its newline; empty lines are skipped."""


class Compression(StrEnum):
    """Around a file, known by its last ending; on standard input by its first bytes."""

    NONE = "none"
    GZIP = "gzip"
    ZSTD = "zstd"
    BZ2 = "bz2"
    XZ = "xz"


_FORMATS = {
    ".jsonl": InputFormat.JSONL,
    ".ndjson": InputFormat.JSONL,
    ".json": InputFormat.JSON,
    ".txt": InputFormat.TEXT,
    ".parquet": InputFormat.PARQUET,
}
_COMPRESSIONS = {
    ".gz": Compression.GZIP,
    ".zst": Compression.ZSTD,
    ".bz2": Compression.BZ2,
    ".xz": Compression.XZ,
}
_KNOWN = ".jsonl, .json, .txt (each plain, .gz, .zst, .bz2 or .xz) or .parquet"


@dataclass(frozen=True, slots=True, kw_only=True)
class InputFile:
    """One file of the corpus, or standard input."""

    path: str
    """``-`` for standard input."""
    format: InputFormat
    """Not AUTO."""
    compression: Compression
    text_documents: TextDocuments = TextDocuments.FILE

    @property
    def is_stdin(self) -> bool:
        return self.path == STDIN

    @property
    def name(self) -> str:
        """For messages."""
        return "standard input" if self.is_stdin else self.path

    @property
    def is_one_document(self) -> bool:
        """True for a plain text file that is one document."""
        return self.format is InputFormat.TEXT and self.text_documents is TextDocuments.FILE

    @property
    def has_keys(self) -> bool:
        """False for plain text."""
        return self.format is not InputFormat.TEXT

    def size(self) -> int | None:
        """Bytes on the disk; None for standard input."""
        return None if self.is_stdin else Path(self.path).stat().st_size


def find_inputs(
    patterns: Sequence[str | Path],
    *,
    input_format: InputFormat = InputFormat.AUTO,
    text_documents: TextDocuments = TextDocuments.FILE,
) -> list[InputFile]:
    """The files behind paths, globs and directories, in the order given; each glob and directory sorted.

    A directory gives the files under it whose ending is known (with ``input_format``: all of them). ValueError where
    something matches nothing, has an unknown ending, or comes twice.
    """
    files: list[InputFile] = []
    for pattern in map(str, patterns):
        for path, is_named in _matches(pattern):
            described = _describe(path, input_format, text_documents)
            if described is not None:
                files.append(described)
            elif is_named:
                raise ValueError(f"{path}: unknown kind of input; expected {_KNOWN}, or say it with --input-format")
        if not files:
            raise ValueError(f"--input {pattern}: no file under it ends in {_KNOWN}")
    seen: set[str] = set()
    for file in files:
        if file.path in seen:
            raise ValueError(f"--input: {file.name} comes twice; its documents would be stored twice")
        seen.add(file.path)
    return files


def _matches(pattern: str) -> list[tuple[str, bool]]:
    """(path, whether the caller named it or a glob did, rather than a directory above it)."""
    if pattern == STDIN:
        return [(STDIN, True)]
    paths = [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern, recursive=True))
    if not paths:
        raise ValueError(f"--input {pattern}: no such file")
    found: list[tuple[str, bool]] = []
    for path in paths:
        if Path(path).is_dir():
            found += [(str(file), False) for file in sorted(Path(path).rglob("*")) if file.is_file()]
        else:
            found.append((path, True))
    return found


def _describe(path: str, input_format: InputFormat, text_documents: TextDocuments) -> InputFile | None:
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    compression = _COMPRESSIONS.get(suffixes[-1], Compression.NONE) if suffixes else Compression.NONE
    ending = suffixes[:-1] if compression is not Compression.NONE else suffixes
    known = _FORMATS.get(ending[-1]) if ending else None
    if input_format is not InputFormat.AUTO:
        known = input_format
    elif path == STDIN:
        known = InputFormat.JSONL
    if known is None:
        return None
    return InputFile(path=path, format=known, compression=compression, text_documents=text_documents)
