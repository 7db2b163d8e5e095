"""Which files a corpus is made of, what their records are, and how they are compressed."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, StrEnum, auto
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
    def may_wait(self) -> bool:
        """True where a read may wait for another process: standard input, a pipe."""
        return self.is_stdin or not Path(self.path).is_file()

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


class _Origin(Enum):
    """How a path came to be an input."""

    NAMED = auto()
    GLOB = auto()
    FOLDER = auto()


def find_inputs(
    patterns: Sequence[str | Path],
    *,
    input_format: InputFormat = InputFormat.AUTO,
    text_documents: TextDocuments = TextDocuments.FILE,
    leave_out: str | None = None,
) -> list[InputFile]:
    """The files behind paths, globs and directories, in the order given; each glob and directory sorted.

    A directory gives the files under it, links followed, whose ending is known (with ``input_format``: all of them).
    What a run with the output prefix ``leave_out`` wrote is passed over unless it is named itself. ValueError where a
    pattern matches nothing, or a file is not there, has an unknown ending or a name that is no UTF-8, or comes twice.
    """
    files: list[InputFile] = []
    for pattern in map(str, patterns):
        before = len(files)
        for path, origin in _matches(pattern):
            if origin is not _Origin.NAMED and leave_out is not None and _is_output(path, leave_out):
                continue
            described = _describe(path, input_format, text_documents)
            if described is not None:
                _check_name(path)
                files.append(described)
            elif origin is not _Origin.FOLDER:
                raise ValueError(f"{path}: unknown kind of input; expected {_KNOWN}, or say it with --input-format")
        if len(files) == before:
            but = "" if leave_out is None else f" (but for what a run wrote to {leave_out})"
            raise ValueError(f"--input {pattern}: no file under it ends in {_KNOWN}{but}")
    seen: dict[str, str] = {}
    for file in files:
        real = STDIN if file.is_stdin else os.path.realpath(file.path)
        if real in seen:
            same = "" if seen[real] == file.path else f" (as {seen[real]})"
            raise ValueError(f"--input: {file.name} comes twice{same}; its documents would be stored twice")
        seen[real] = file.path
    return files


def _matches(pattern: str) -> list[tuple[str, _Origin]]:
    if pattern == STDIN:
        return [(STDIN, _Origin.NAMED)]
    is_named = os.path.lexists(pattern)
    paths = [pattern] if is_named else sorted(glob.glob(pattern, recursive=True))
    if not paths:
        raise ValueError(f"--input {pattern}: no such file")
    found: list[tuple[str, _Origin]] = []
    for path in paths:
        if Path(path).is_dir():
            found += [(file, _Origin.FOLDER) for file in sorted(_under(path), key=lambda file: Path(file).parts)]
        else:
            found.append((path, _Origin.NAMED if is_named else _Origin.GLOB))
    return found


def _under(folder: str, above: frozenset[str] = frozenset()) -> list[str]:
    """Files and links to nothing below a folder; a link to a folder that it lies in is passed over."""
    real = os.path.realpath(folder)
    if real in above:
        return []
    try:
        names = os.listdir(folder)
    except OSError as error:
        raise ValueError(f"--input: {folder} cannot be listed ({error.strerror})") from error
    found: list[str] = []
    for path in (str(Path(folder, name)) for name in names):
        if os.path.isdir(path):
            found += _under(path, above | {real})
        elif os.path.isfile(path) or not os.path.exists(path):
            found.append(path)
    return found


def _is_output(path: str, prefix: str) -> bool:
    """Whether a run with this output prefix gives its files such names; not every name that begins like that."""
    folder, name = os.path.split(path)
    output_folder, output_name = os.path.split(prefix)
    if os.path.realpath(folder) != os.path.realpath(output_folder):
        return False
    if name.startswith(f"{output_name}.part-"):
        return True
    return name.startswith(f"{output_name}_") and any(
        f"{part}." in name for part in ("_document", "_tokens", "_loss_mask")
    )


def _check_name(path: str) -> None:
    if path != STDIN and not os.path.exists(path):
        raise ValueError(f"{path}: a link to a file that is not there; mend the link or remove it")
    try:
        path.encode()
    except UnicodeEncodeError as error:
        shown = os.fsencode(path).decode("utf-8", "backslashreplace")
        raise ValueError(f"{shown}: the file's name is no UTF-8, as the manifest needs it; rename the file") from error


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
