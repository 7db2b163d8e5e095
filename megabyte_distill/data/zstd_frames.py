"""zstd, whose library takes the end of a file in the middle of a frame for the end of the text."""

from __future__ import annotations

import io
from typing import IO, Any, cast

import zstandard

_READ_BYTES = 1 << 18
_END = b"the end of the file, and no frame that goes on"
_END_FRAME = zstandard.ZstdCompressor(write_checksum=True).compress(_END)
"""Its last bytes are not its content's, should it be taken for bytes of a frame before it."""


class ZstdFrames:
    """The content of frames one after the other.

    A frame of ours is put behind the last one: it comes out as the last only where all others are whole. Its first byte
    comes alone: libzstd, given a whole frame at once while a cut header waits, decodes that and forgets the header.
    """

    def __init__(self, plain: io.BufferedReader[Any]) -> None:
        self._source = _WithEnd(plain)
        # the library's own limit refuses what zstd --long=31 writes
        decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
        source = cast(IO[bytes], self._source)  # of which it calls read alone
        self._content = decompressor.stream_reader(source, read_size=_READ_BYTES, read_across_frames=True)
        self._held = b""
        """May be the end frame's content, or the beginning of it."""

    def read(self, size: int, /) -> bytes:
        """At most ``size`` bytes and an end's, b"" at the end. EOFError or ZstdError where that is missing."""
        while True:
            content = self._content.read(size)
            if content and not self._source.is_ended:
                return content
            if not content:
                if self._held != _END:
                    raise EOFError("the zst stream ends in the middle")
                if self._source.is_empty:
                    raise EOFError("empty, expected a zst stream")
                return b""
            content = self._held + content
            content, self._held = content[: -len(_END)], content[-len(_END) :]
            if content:
                return content


class _WithEnd:
    """A file with the end frame behind it."""

    def __init__(self, plain: io.BufferedReader[Any]) -> None:
        self._plain = plain
        self.is_empty, self.is_ended = True, False
        self._end = [_END_FRAME[:1], _END_FRAME[1:]]

    def read(self, size: int) -> bytes:
        if not self.is_ended:
            if source := self._plain.read(size):
                self.is_empty = False
                return source
            self.is_ended = True
        return self._end.pop(0) if self._end else b""
