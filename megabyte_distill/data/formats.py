"""Megatron's indexed format, read and written without Megatron: PREFIX.bin holds the items, PREFIX.idx where they are.

Index layout, little endian: ``MMIDIDX\\0\\0``, version u64 = 1, dtype code u8, item count N u64, document index
length u64, item lengths i32 [N] (in elements), item offsets i64 [N] (in bytes), document index i64.
The writer's items are documents of one sequence each, so its document index is 0 … N.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import struct
import weakref
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import DTypeLike, NDArray

from megabyte_distill.files import partial_path, publish

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_CODES: dict[int, np.dtype[Any]] = {
    1: np.dtype(np.uint8),
    2: np.dtype(np.int8),
    3: np.dtype(np.int16),
    4: np.dtype(np.int32),
    5: np.dtype(np.int64),
    6: np.dtype(np.float64),
    7: np.dtype(np.float32),
    8: np.dtype(np.uint16),
}
_WRITABLE = tuple(_CODES[code] for code in (1, 8, 4))
_MAX_ITEM = 2**31 - 1
_BLOCK = 1 << 20
_COPY_BYTES = 8 << 20
_SYNC_BYTES = 32 << 20


def _sync_data(descriptor: int) -> None:
    getattr(os, "fdatasync", os.fsync)(descriptor)  # not every system has the former


class IndexedWriter:
    """Writes one .bin/.idx pair; nothing carries its final name before :meth:`publish`.

    Use as a context manager: leaving it by an exception removes the partial files. ``finish`` makes both partial
    files durable, ``publish`` renames them, the .idx last; together they are ``close``.
    """

    def __init__(self, prefix: str | Path, dtype: DTypeLike) -> None:
        """``prefix`` without .bin; ``dtype`` uint8, uint16 or int32, else ValueError."""
        self.dtype = np.dtype(dtype)
        if self.dtype not in _WRITABLE:
            raise ValueError(f"{prefix}: cannot write dtype {self.dtype}; expected uint8, uint16 or int32")
        self.bin_path, self.idx_path = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
        # lengths go to the disk as well: a corpus of a billion documents would not leave room for them
        self._lengths_path = partial_path(Path(f"{prefix}.lengths"))
        self._count = 0
        self._finished = False
        self._syncer = ThreadPoolExecutor(1, thread_name_prefix="sync")
        self._syncing: Future[None] | None = None
        self._unsynced = 0
        self._stream: BinaryIO = open(partial_path(self.bin_path), "wb")  # noqa: SIM115  closed by finish or discard
        self._lengths: BinaryIO = open(self._lengths_path, "wb+")  # noqa: SIM115  closed by finish or discard

    def add(self, item: NDArray[Any]) -> None:
        """Appends one item [any length]; ValueError where its values do not fit the dtype or it is too long."""
        if item.dtype != self.dtype:
            converted = item.astype(self.dtype)
            if not np.array_equal(converted, item):
                raise ValueError(f"{self.bin_path}: item {self._count} has values that do not fit {self.dtype}")
            item = converted
        self.add_many(item, np.array([item.size], dtype=np.int64))

    def add_many(self, flat: NDArray[Any], lengths: NDArray[np.int64]) -> None:
        """Appends items that lie one after the other in ``flat`` (already of this dtype), ``lengths`` elements each."""
        if flat.dtype != self.dtype or int(lengths.sum()) != flat.size:
            raise ValueError(
                f"{self.bin_path}: got {flat.size} elements of {flat.dtype} for items of {int(lengths.sum())} elements "
                f"of {self.dtype}"
            )
        if lengths.size and int(lengths.max()) > _MAX_ITEM:
            raise ValueError(
                f"{self.bin_path}: an item of {int(lengths.max())} elements; the format allows {_MAX_ITEM}: split it"
            )
        self._stream.write(np.ascontiguousarray(flat).data)
        self._sync_early(flat.nbytes)
        self._lengths.write(lengths.astype(np.int32).tobytes())
        self._count += int(lengths.size)

    def _sync_early(self, written: int) -> None:
        """Now and then has the disk take what is there, beside the writing, so that ``finish`` waits for little."""
        self._unsynced += written
        if self._unsynced >= _SYNC_BYTES and (self._syncing is None or self._syncing.done()):
            self._await_sync()
            self._unsynced = 0
            self._syncing = self._syncer.submit(_sync_data, self._stream.fileno())

    def _await_sync(self) -> None:
        """Raises what went wrong beside the writing."""
        if self._syncing is not None:
            self._syncing.result()
            self._syncing = None

    def extend(self, reader: IndexedReader) -> None:
        """Appends all items of a data set of the same dtype, which :meth:`IndexedReader.verify` found to be whole."""
        assert reader.dtype == self.dtype, (reader.dtype, self.dtype)
        with open(reader.bin_path, "rb") as source:
            shutil.copyfileobj(source, self._stream, _COPY_BYTES)
        for start in range(0, len(reader), _BLOCK):
            self._lengths.write(np.asarray(reader.lengths[start : start + _BLOCK], dtype=np.int32).tobytes())
        self._count += len(reader)

    def finish(self) -> None:
        """Flushes the data and writes the index, both still under partial names."""
        if self._finished:
            return
        self._stream.flush()
        self._await_sync()
        os.fsync(self._stream.fileno())
        self._syncer.shutdown()
        self._stream.close()
        with open(partial_path(self.idx_path), "wb") as stream:
            self._write_index(stream)
            stream.flush()
            os.fsync(stream.fileno())
        self._lengths.close()
        self._lengths_path.unlink()
        self._finished = True

    def _write_index(self, stream: BinaryIO) -> None:
        code = next(code for code, dtype in _CODES.items() if dtype == self.dtype)
        stream.write(_HEADER.pack(_MAGIC, 1, code, self._count, self._count + 1))
        for lengths in self._stored_lengths():
            stream.write(lengths.tobytes())
        offset = 0
        for lengths in self._stored_lengths():
            sizes = lengths.astype(np.int64) * self.dtype.itemsize
            ends = offset + np.cumsum(sizes)
            stream.write((ends - sizes).tobytes())
            offset = int(ends[-1])
        for start in range(0, self._count + 1, _BLOCK):
            stream.write(np.arange(start, min(start + _BLOCK, self._count + 1), dtype=np.int64).tobytes())

    def _stored_lengths(self) -> Iterator[NDArray[np.int32]]:
        self._lengths.seek(0)
        while block := self._lengths.read(4 * _BLOCK):
            yield np.frombuffer(block, dtype=np.int32)

    def publish(self) -> None:
        """Renames both files to their final names; the .idx, without which the .bin means nothing, comes last."""
        assert self._finished, "publish before finish"
        self.idx_path.unlink(missing_ok=True)
        publish(self.bin_path)
        publish(self.idx_path)

    def close(self) -> None:
        """``finish`` and ``publish``."""
        self.finish()
        self.publish()

    def discard(self) -> None:
        """Removes what was written so far."""
        self._syncer.shutdown()
        for stream in (self._stream, self._lengths):
            with contextlib.suppress(OSError):  # a full disk refuses what is still buffered, which is unwanted now
                stream.close()
        self._lengths_path.unlink(missing_ok=True)
        partial_path(self.bin_path).unlink(missing_ok=True)
        partial_path(self.idx_path).unlink(missing_ok=True)

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.discard()


class _Pieces:
    """A file of which pieces are read, any number of processes at once.

    Not mapped: pages of a map count as this process's memory, and a file that shrinks under it kills the process.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            hint = "; a blend of many data sets needs a higher limit: ulimit -n" if error.errno == errno.EMFILE else ""
            raise ValueError(f"{path}: cannot be opened ({error}){hint}") from error
        weakref.finalize(self, os.close, self._descriptor)
        self.size = os.fstat(self._descriptor).st_size

    def read(self, offset: int, count: int, dtype: DTypeLike) -> NDArray[Any]:
        """A new array of ``count`` elements from byte ``offset`` on; ValueError where the file does not hold them."""
        piece = np.empty(count, dtype=dtype)
        done = 0
        while done < piece.nbytes:  # the system hands out two gigabytes at most
            try:
                got = os.preadv(self._descriptor, [piece.data.cast("B")[done:]], offset + done)
            except OSError as error:
                raise self._unreadable(offset + done, error) from error
            if not got:
                raise self._changed(offset + done)
            done += got
        return piece

    def number(self, offset: int, size: int) -> int:
        """The signed number of ``size`` bytes at byte ``offset``; a call that costs little, for millions of them."""
        try:
            content = os.pread(self._descriptor, size, offset)
        except OSError as error:
            raise self._unreadable(offset, error) from error
        if len(content) != size:
            raise self._changed(offset + len(content))
        return int.from_bytes(content, "little", signed=True)

    def _unreadable(self, offset: int, error: OSError) -> ValueError:
        return ValueError(f"{self._path}: cannot be read at byte {offset} ({error})")

    def _changed(self, offset: int) -> ValueError:
        return ValueError(
            f"{self._path}: ends at byte {offset}, it had {self.size} when it was opened: a file in use must not change"
        )


class IndexedReader:
    """Random access to the items of one .bin/.idx pair.

    Opening costs the same for ten items and for a hundred million: sizes are checked against the header and against
    the last item; each item is checked when it is read; :meth:`verify` checks all of them.
    """

    def __init__(self, prefix: str | Path) -> None:
        """``prefix`` without .bin. ValueError names the file and says what was got and what was expected."""
        self.bin_path, self.idx_path = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
        for path in (self.idx_path, self.bin_path):
            if not path.is_file():
                raise ValueError(f"{path}: no such file; expected an indexed data set under the stem {prefix}")
        self._index, self._data = _Pieces(self.idx_path), _Pieces(self.bin_path)
        self.dtype, self._count, documents = self._read_header()
        count = self._count
        self._lengths_at, self._offsets_at, self._documents_at, end = accumulate(
            (_HEADER.size, 4 * count, 8 * count, 8 * documents)
        )
        if self._index.size not in (end, end + count):  # Megatron may append one mode byte an item
            raise ValueError(
                f"{self.idx_path}: {self._index.size} bytes, expected {end} for {count} items: truncated or damaged, "
                "preprocess again"
            )
        self._documents = documents
        self.bin_bytes = self._data.size
        length, offset = self._pointer(count - 1) if count else (0, 0)
        expected = offset + length * self.dtype.itemsize
        if self.bin_bytes != expected:
            raise ValueError(
                f"{self.bin_path}: {self.bin_bytes} bytes, expected {expected} by its index: truncated or damaged, "
                "preprocess again"
            )

    def _read_header(self) -> tuple[np.dtype[Any], int, int]:
        size = self._index.size
        if size < _HEADER.size:
            raise ValueError(f"{self.idx_path}: {size} bytes, expected at least {_HEADER.size} for the header")
        header = self._index.read(0, _HEADER.size, np.uint8)
        magic, version, code, count, documents = _HEADER.unpack(header.tobytes())
        if magic != _MAGIC:
            raise ValueError(f"{self.idx_path}: starts with {magic!r}, expected {_MAGIC!r}: not an indexed data set")
        if version != 1:
            raise ValueError(f"{self.idx_path}: format version {version}, expected 1")
        if code not in _CODES:
            raise ValueError(f"{self.idx_path}: dtype code {code}, expected one of {sorted(_CODES)}")
        return _CODES[code], count, documents

    def __len__(self) -> int:
        return self._count

    @cached_property
    def lengths(self) -> NDArray[np.int32]:
        """[N] elements of each item, mapped: read as they are touched. Single ones are cheaper by :meth:`length`."""
        return self._map(self._lengths_at, self._count, np.int32)

    @cached_property
    def document_index(self) -> NDArray[np.int64]:
        """First item of each document, and the number of items; mapped."""
        return self._map(self._documents_at, self._documents, np.int64)

    def _map(self, offset: int, count: int, dtype: DTypeLike) -> NDArray[Any]:
        if not count:
            return np.zeros(0, dtype=dtype)
        return np.asarray(np.memmap(self.idx_path, dtype=dtype, mode="r", offset=offset, shape=(count,)))

    def length(self, item: int) -> int:
        """Elements of an item."""
        self._check_item(item)
        return self._index.number(self._lengths_at + 4 * item, 4)

    def _pointer(self, item: int) -> tuple[int, int]:
        """(elements, first byte in the .bin) of an item, as the index has them."""
        return self.length(item), self._index.number(self._offsets_at + 8 * item, 8)

    def _check_item(self, item: int) -> None:
        if not 0 <= item < self._count:
            raise IndexError(f"{self.idx_path}: item {item} of {self._count}")

    def read(self, item: int, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Elements ``start`` … ``stop`` of an item, as an array of its own."""
        length, offset = self._pointer(item)
        end = offset + length * self.dtype.itemsize
        if length < 0 or offset < 0 or end > self.bin_bytes:
            raise ValueError(
                f"{self.idx_path}: item {item} lies at bytes {offset} … {end}, {self.bin_path.name} has "
                f"{self.bin_bytes}: damaged index, preprocess again"
            )
        stop = length if stop is None else stop
        if not 0 <= start <= stop <= length:
            raise ValueError(f"{self.bin_path}: item {item} has {length} elements, asked for {start} … {stop}")
        return self._data.read(offset + start * self.dtype.itemsize, stop - start, self.dtype)

    def verify(self) -> None:
        """Checks every pointer: items follow each other without gap or overlap; else ValueError with the first."""
        expected = 0
        for start in range(0, len(self), _BLOCK):
            count = min(_BLOCK, len(self) - start)
            lengths = self._index.read(self._lengths_at + 4 * start, count, np.int32).astype(np.int64)
            offsets = self._index.read(self._offsets_at + 8 * start, count, np.int64)
            ends = expected + np.cumsum(lengths * self.dtype.itemsize)
            wrong = np.flatnonzero((offsets != np.concatenate(([expected], ends[:-1]))) | (lengths < 0))
            if wrong.size:
                raise ValueError(
                    f"{self.idx_path}: item {start + int(wrong[0])} is at byte {int(offsets[wrong[0]])}, not "
                    "behind the item before it: damaged index, preprocess again"
                )
            expected = int(ends[-1])
