"""A file read once: counted and hashed as it lies on the disk, decompressed by a thread ahead of the reader."""

from __future__ import annotations

import bz2
import hashlib
import io
import lzma
import queue
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, cast

import zstandard

from megabyte_distill.data.inputs import Compression, InputFile

BLOCK_BYTES = 1 << 20
"""What is read, decompressed and handed on at a time."""
_BLOCKS_AHEAD = 8
_ZSTD_FEED, _ZSTD_FEED_FAST = 512, 4096
"""Bytes of a zstd stream taken at a time: four of them may stand for 128 KiB of text, so the fast way is for text that
has just shown to be of a common kind."""
_ZSTD_COMMON = 1 << 16
"""Bytes of text that such a piece gives at most."""
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
    return plain if compression is Compression.NONE else _Members(plain, compression)


class _Decompressor(Protocol):
    """Of one gzip or bz2 member, xz stream or zstd frame, as the standard library's BZ2Decompressor."""

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


class _Zstd:
    """zstd's object, which knows no limit, fed so little at a time that its answer stays small."""

    def __init__(self) -> None:
        # the library's own limit refuses what zstd --long=31 writes
        self._inner = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
        self._source, self._place = b"", 0
        self._ready = b""
        self._feed = _ZSTD_FEED

    @property
    def eof(self) -> bool:
        return self._inner.eof and not self._ready

    @property
    def needs_input(self) -> bool:
        return not self._ready and not self._inner.eof and self._place >= len(self._source)

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data + self._source[self._place :]

    def decompress(self, data: bytes, max_length: int) -> bytes:
        self._source, self._place = self._source[self._place :] + data, 0
        if len(self._ready) > max_length:
            content, self._ready = self._ready[:max_length], self._ready[max_length:]
            return content
        pieces, size, self._ready = [self._ready], len(self._ready), b""
        while self._place < len(self._source) and not self._inner.eof:
            piece = self._inner.decompress(self._source[self._place : self._place + self._feed])
            self._place += self._feed
            self._feed = _ZSTD_FEED_FAST if len(piece) <= _ZSTD_COMMON else _ZSTD_FEED
            size += len(piece)
            if size > max_length:
                self._ready = piece
                break
            pieces.append(piece)
        return b"".join(pieces)


_DECOMPRESSORS: dict[Compression, Callable[[], _Decompressor]] = {
    Compression.GZIP: _Gzip,
    Compression.BZ2: bz2.BZ2Decompressor,
    Compression.XZ: lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ),
    Compression.ZSTD: _Zstd,
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


def blocks(stream: Readable, *, may_wait: bool) -> Iterator[bytes]:
    """Pieces of a stream of a MiB at most, read by a thread that is a few pieces ahead; its errors are raised here.

    ``may_wait``: a read may wait for another process, so that a reader that stops early must not wait for its thread.
    """
    ready: queue.Queue[bytes | BaseException | None] = queue.Queue(_BLOCKS_AHEAD)
    stop = threading.Event()

    def put(item: bytes | BaseException | None) -> bool:
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def read() -> None:
        try:
            while block := stream.read(BLOCK_BYTES):
                if not put(block):
                    return
            put(None)
        except BaseException as error:
            put(error)

    thread = threading.Thread(target=read, name="read ahead", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        if not may_wait:
            thread.join()


@contextmanager
def opened(file: InputFile) -> Iterator[tuple[HashedFile, io.BufferedReader[Any], Readable]]:
    """The raw file with its hash, its bytes and its content; ValueError names it where it cannot be read to its end."""
    try:
        with HashedFile(file) as raw:
            plain = io.BufferedReader(raw, BLOCK_BYTES)  # not closed: that would wait for a thread that reads
            yield raw, plain, decompressed(plain, file)
            while plain.read(BLOCK_BYTES):  # what a decompressor leaves behind belongs to the file's hash
                pass
    except DAMAGE as error:
        raise ValueError(
            f"{file.name}: cannot be read to its end ({error}): damaged, truncated or unreadable"
        ) from error
