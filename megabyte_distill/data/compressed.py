"""A file read once: counted and hashed as it lies on the disk, and decompressed."""

from __future__ import annotations

import bz2
import hashlib
import io
import lzma
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, cast

import zstandard

from megabyte_distill.data.inputs import Compression, InputFile
from megabyte_distill.data.zstd_frames import ZstdFrames

BLOCK_BYTES = 1 << 20
"""What is read, decompressed and handed on at a time, about."""
_MAGIC = {
    b"\x1f\x8b": Compression.GZIP,
    b"\x28\xb5\x2f\xfd": Compression.ZSTD,
    b"BZh": Compression.BZ2,
    b"\xfd7zXZ\x00": Compression.XZ,
}
_MAGIC_BYTES = max(map(len, _MAGIC))
DAMAGE = (OSError, EOFError, lzma.LZMAError, zlib.error, zstandard.ZstdError)
"""What a truncated or damaged file raises, by compression."""


class HashedFile(io.RawIOBase):
    """Counts and hashes what is read from it, so that hashing costs no second pass over the disk."""

    def __init__(self, file: InputFile) -> None:
        """Opens a file, or takes standard input."""
        if file.is_stdin:
            # without its buffer, whose lock a thread that waits for input would hold until the interpreter's end
            stream = getattr(sys.stdin.buffer, "raw", sys.stdin.buffer)
        else:
            stream = open(file.path, "rb", buffering=0)  # noqa: SIM115  closed below
        self._file = cast(Any, stream)
        self._is_own = not file.is_stdin
        self._digest = hashlib.sha256()
        self.count = 0
        """Bytes read so far."""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        view, count = memoryview(buffer), 0
        while got := int(self._file.readinto(view[count:])):
            count += got
            if self.count + count >= _MAGIC_BYTES:  # a pipe may give the first ones one by one
                break
        self._digest.update(view[:count])
        self.count += count
        return count

    def hexdigest(self) -> str:
        """sha256 of what was read so far."""
        return self._digest.hexdigest()

    def close(self) -> None:
        if self._is_own and not self.closed:
            self._file.close()
        super().close()


class Readable(Protocol):
    """What :func:`blocks` reads."""

    def read(self, size: int, /) -> bytes:
        """At most ``size`` bytes, b"" at the end."""
        ...


def decompressed(plain: io.BufferedReader[Any], file: InputFile) -> Readable:
    """The content; several gzip, zstd, bz2 or xz members one after the other are read to the last."""
    compression = file.compression
    if file.is_stdin:  # it has no ending that would tell
        head = plain.peek(_MAGIC_BYTES)
        compression = next((kind for magic, kind in _MAGIC.items() if head.startswith(magic)), compression)
    if compression is Compression.NONE:
        return plain
    return ZstdFrames(plain) if compression is Compression.ZSTD else _Members(plain, compression)


class _Decompressor(Protocol):
    """Of one gzip or bz2 member or xz stream, as the standard library's BZ2Decompressor."""

    @property
    def eof(self) -> bool: ...

    @property
    def needs_input(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes, max_length: int) -> bytes: ...


class _Gzip:
    """zlib's object with the interface of the others."""

    def __init__(self) -> None:
        self._inner = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
        self._was_full = False

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def needs_input(self) -> bool:
        return not self._was_full and not self.eof

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data

    def decompress(self, data: bytes, max_length: int) -> bytes:
        content = self._inner.decompress(self._inner.unconsumed_tail + data, max_length)
        self._was_full = len(content) == max_length
        return content


_DECOMPRESSORS: dict[Compression, Callable[[], _Decompressor]] = {
    Compression.GZIP: _Gzip,
    Compression.BZ2: bz2.BZ2Decompressor,
    Compression.XZ: lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ),
}
_PADDING = {Compression.GZIP: 1, Compression.XZ: 4}
"""Zero bytes may stand behind a member, in multiples of so many."""


class _Members:
    """The content of an archive's members one after the other; the libraries' own files pass over a damaged member."""

    def __init__(self, plain: io.BufferedReader[Any], compression: Compression) -> None:
        self._plain, self._compression = plain, compression
        self._member = _DECOMPRESSORS[compression]()
        self._is_started = False

    def read(self, size: int, /) -> bytes:
        """At most ``size`` bytes, b"" at the end. EOFError where that is missing, an error of :data:`DAMAGE` for bytes
        that are no member.
        """
        while True:
            if self._member.eof:
                source = self._next_member()
                if not source:
                    return b""
                self._member = _DECOMPRESSORS[self._compression]()
            else:
                source = self._plain.read(BLOCK_BYTES // 4) if self._member.needs_input else b""
                if not source and self._member.needs_input:
                    raise EOFError(
                        f"the {self._compression} stream ends in the middle"
                        if self._is_started
                        else f"empty, expected a {self._compression} stream"
                    )
            self._is_started = True
            if content := self._member.decompress(source, size):
                return content

    def _next_member(self) -> bytes:
        """What stands behind a member and its padding; b"" at the end."""
        source = self._member.unused_data or self._plain.read(BLOCK_BYTES // 4)
        multiple = _PADDING.get(self._compression, 0)
        zeros = 0
        while multiple:
            rest = source.lstrip(b"\0")
            zeros += len(source) - len(rest)
            if rest or not source:
                source = rest
                break
            source = self._plain.read(BLOCK_BYTES // 4)
        if multiple and zeros % multiple:
            raise EOFError(f"{zeros} zero bytes behind a stream, expected a multiple of {multiple}")
        return source


def blocks(stream: Readable) -> Iterator[list[bytes]]:
    """A stream in blocks of one to two MiB (the last is shorter), each the pieces it was read in."""
    pieces: list[bytes] = []
    size = 0
    while piece := stream.read(BLOCK_BYTES):
        pieces.append(piece)
        size += len(piece)
        if size >= BLOCK_BYTES:
            yield pieces
            pieces, size = [], 0
    if pieces:
        yield pieces


@contextmanager
def opened(file: InputFile) -> Iterator[tuple[HashedFile, io.BufferedReader[Any], Readable]]:
    """The raw file with its hash, its bytes and its content; ValueError names it where it cannot be read to its end."""
    try:
        with HashedFile(file) as raw:
            plain = io.BufferedReader(raw, BLOCK_BYTES)
            yield raw, plain, decompressed(plain, file)
            while plain.read(BLOCK_BYTES):  # what a decompressor leaves behind belongs to the file's hash
                pass
    except DAMAGE as error:
        raise ValueError(
            f"{file.name}: cannot be read to its end ({error}): damaged, truncated or unreadable"
        ) from error
