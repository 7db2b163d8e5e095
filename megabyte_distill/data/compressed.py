"""A file read once: counted and hashed as it lies on the disk, decompressed by a thread ahead of the reader."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import lzma
import queue
import sys
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any, cast

import zstandard

from megabyte_distill.data.inputs import Compression, InputFile

BLOCK_BYTES = 1 << 20
"""What is read, decompressed and handed on at a time."""
_BLOCKS_AHEAD = 8
_MAGIC = {
    b"\x1f\x8b": Compression.GZIP,
    b"\x28\xb5\x2f\xfd": Compression.ZSTD,
    b"BZh": Compression.BZ2,
    b"\xfd7zXZ\x00": Compression.XZ,
}
DAMAGE = (OSError, EOFError, lzma.LZMAError, zlib.error, zstandard.ZstdError)
"""What a truncated or damaged file raises, by compression."""


class HashedFile(io.RawIOBase):
    """Counts and hashes what is read from it, so that hashing costs no second pass over the disk."""

    def __init__(self, file: InputFile) -> None:
        """Opens a file, or takes standard input."""
        stream = sys.stdin.buffer if file.is_stdin else open(file.path, "rb", buffering=0)  # noqa: SIM115  closed below
        self._file = cast(Any, stream)
        self._is_own = not file.is_stdin
        self._digest = hashlib.sha256()
        self.count = 0
        """Bytes read so far."""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        count = int(self._file.readinto(buffer))
        self._digest.update(memoryview(buffer)[:count])
        self.count += count
        return count

    def hexdigest(self) -> str:
        """sha256 of what was read so far."""
        return self._digest.hexdigest()

    def close(self) -> None:
        if self._is_own and not self.closed:
            self._file.close()
        super().close()


def decompressed(plain: io.BufferedReader[Any], file: InputFile) -> IO[bytes]:
    """The content; several gzip, zstd, bz2 or xz members one after the other are read to the last."""
    compression = file.compression
    if file.is_stdin:  # it has no ending that would tell
        head = plain.peek(8)
        compression = next((kind for magic, kind in _MAGIC.items() if head.startswith(magic)), compression)
    if compression is Compression.GZIP:
        return cast(IO[bytes], gzip.GzipFile(fileobj=plain))
    if compression is Compression.XZ:
        return cast(IO[bytes], lzma.LZMAFile(plain))
    if compression is Compression.BZ2:
        return cast(IO[bytes], bz2.BZ2File(plain))
    if compression is Compression.ZSTD:
        return cast(IO[bytes], _ZstdFrames(plain))
    return cast(IO[bytes], plain)


class _ZstdFrames:
    """A zstd stream that must end with a whole frame: the library takes a truncated one for its end."""

    def __init__(self, plain: io.BufferedReader[Any]) -> None:
        self._plain = plain
        self._start_frame()
        self._rest = b""

    def _start_frame(self) -> None:
        # the library's own limit refuses what zstd --long=31 writes
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()

    def read(self, size: int = -1) -> bytes:
        """About ``size`` bytes, b"" at the end; EOFError where the last frame is cut off."""
        while True:
            source = self._rest or self._plain.read(BLOCK_BYTES // 4)
            self._rest = b""
            if not source:
                if not self._decompressor.eof:
                    raise EOFError("the compressed stream ends in the middle of a frame")
                return b""
            if self._decompressor.eof:
                self._start_frame()
            content = self._decompressor.decompress(source)
            if self._decompressor.eof:
                self._rest = self._decompressor.unused_data
            if content:
                return content


def blocks(stream: IO[bytes]) -> Iterator[bytes]:
    """Pieces of a stream of about a MiB, read by a thread that is a few pieces ahead; its errors are raised here."""
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
        thread.join()


@contextmanager
def opened(file: InputFile) -> Iterator[tuple[HashedFile, IO[bytes]]]:
    """The raw file with its hash, and its content; ValueError names the file where it cannot be read to its end."""
    try:
        with HashedFile(file) as raw, io.BufferedReader(raw, BLOCK_BYTES) as plain:
            yield raw, decompressed(plain, file)
            while plain.read(BLOCK_BYTES):  # what a decompressor leaves behind belongs to the file's hash
                pass
    except DAMAGE as error:
        raise ValueError(
            f"{file.name}: cannot be read to its end ({error}): damaged, truncated or unreadable"
        ) from error
