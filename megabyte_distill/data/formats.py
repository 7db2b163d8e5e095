"""Megatron's indexed format, read and written without Megatron: PREFIX.bin holds the items, PREFIX.idx where they are.

Index layout, little endian: ``MMIDIDX\\0\\0``, version u64 = 1, dtype code u8, item count N u64, document index
length u64, item lengths i32 [N] (in elements), item offsets i64 [N] (in bytes), document index i64.
The writer's items are documents of one sequence each, so its document index is 0 … N.
"""

from __future__ import annotations

import os
import struct
from array import array
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import DTypeLike, NDArray

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
PARTIAL_SUFFIX = ".partial"
"""Appended to the name of a file that is still being written."""


def publish(final: Path) -> None:
    """Gives a finished ``final + PARTIAL_SUFFIX`` its final name, durably (rename, then fsync of the directory)."""
    os.replace(partial_path(final), final)
    directory = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def partial_path(final: Path) -> Path:
    """Where ``final`` is written before it is complete."""
    return final.with_name(final.name + PARTIAL_SUFFIX)


def write_and_sync(path: Path, content: bytes) -> None:
    """Writes a small file whole and waits until the disk has it."""
    with open(path, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


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
        self._lengths = array("i")
        self._finished = False
        self._stream: BinaryIO = open(partial_path(self.bin_path), "wb")  # noqa: SIM115  closed by finish or discard

    def add(self, item: NDArray[Any]) -> None:
        """Appends one item [any length]; ValueError where its values do not fit the dtype or it is too long."""
        if item.dtype != self.dtype:
            converted = item.astype(self.dtype)
            if not np.array_equal(converted, item):
                raise ValueError(f"{self.bin_path}: item {len(self._lengths)} has values that do not fit {self.dtype}")
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
        self._lengths.frombytes(lengths.astype(np.int32).tobytes())

    def finish(self) -> None:
        """Flushes the data and writes the index, both still under partial names."""
        if self._finished:
            return
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        with open(partial_path(self.idx_path), "wb") as stream:
            self._write_index(stream)
            stream.flush()
            os.fsync(stream.fileno())
        self._finished = True

    def _write_index(self, stream: BinaryIO) -> None:
        lengths = np.frombuffer(self._lengths, dtype=np.int32) if self._lengths else np.zeros(0, dtype=np.int32)
        code = next(code for code, dtype in _CODES.items() if dtype == self.dtype)
        stream.write(_HEADER.pack(_MAGIC, 1, code, lengths.size, lengths.size + 1))
        stream.write(lengths.tobytes())
        offset = 0
        for start in range(0, lengths.size, _BLOCK):
            sizes = lengths[start : start + _BLOCK].astype(np.int64) * self.dtype.itemsize
            ends = offset + np.cumsum(sizes)
            stream.write((ends - sizes).tobytes())
            offset = int(ends[-1])
        for start in range(0, lengths.size + 1, _BLOCK):
            stream.write(np.arange(start, min(start + _BLOCK, lengths.size + 1), dtype=np.int64).tobytes())

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
        self._stream.close()
        partial_path(self.bin_path).unlink(missing_ok=True)
        partial_path(self.idx_path).unlink(missing_ok=True)

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.discard()


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
        index = (
            np.memmap(self.idx_path, dtype=np.uint8, mode="r") if self.idx_path.stat().st_size else np.zeros(0, "u1")
        )
        self.dtype, count, documents = self._read_header(index)
        ends = list(accumulate((_HEADER.size, 4 * count, 8 * count, 8 * documents)))
        if index.size != ends[-1] and index.size != ends[-1] + count:  # Megatron may append one mode byte an item
            raise ValueError(
                f"{self.idx_path}: {index.size} bytes, expected {ends[-1]} for {count} items: truncated or damaged, "
                "preprocess again"
            )
        self.lengths: NDArray[np.int32] = index[ends[0] : ends[1]].view(np.int32)
        self._offsets: NDArray[np.int64] = index[ends[1] : ends[2]].view(np.int64)
        self.document_index: NDArray[np.int64] = index[ends[2] : ends[3]].view(np.int64)
        self.bin_bytes = self.bin_path.stat().st_size
        expected = int(self._offsets[-1]) + int(self.lengths[-1]) * self.dtype.itemsize if count else 0
        if self.bin_bytes != expected:
            raise ValueError(
                f"{self.bin_path}: {self.bin_bytes} bytes, expected {expected} by its index: truncated or damaged, "
                "preprocess again"
            )
        self._data: NDArray[np.uint8] = (
            np.memmap(self.bin_path, dtype=np.uint8, mode="r") if self.bin_bytes else np.zeros(0, dtype=np.uint8)
        )

    def _read_header(self, index: NDArray[np.uint8]) -> tuple[np.dtype[Any], int, int]:
        if index.size < _HEADER.size:
            raise ValueError(f"{self.idx_path}: {index.size} bytes, expected at least {_HEADER.size} for the header")
        magic, version, code, count, documents = _HEADER.unpack(index[: _HEADER.size].tobytes())
        if magic != _MAGIC:
            raise ValueError(f"{self.idx_path}: starts with {magic!r}, expected {_MAGIC!r}: not an indexed data set")
        if version != 1:
            raise ValueError(f"{self.idx_path}: format version {version}, expected 1")
        if code not in _CODES:
            raise ValueError(f"{self.idx_path}: dtype code {code}, expected one of {sorted(_CODES)}")
        return _CODES[code], count, documents

    def __len__(self) -> int:
        return int(self.lengths.size)

    def length(self, item: int) -> int:
        """Elements of an item."""
        return int(self.lengths[item])

    def read(self, item: int, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """A copy of elements ``start`` … ``stop`` of an item (a view would outlive the mapped file and crash)."""
        length, offset = int(self.lengths[item]), int(self._offsets[item])
        end = offset + length * self.dtype.itemsize
        if length < 0 or offset < 0 or end > self.bin_bytes:
            raise ValueError(
                f"{self.idx_path}: item {item} lies at bytes {offset} … {end}, {self.bin_path.name} has "
                f"{self.bin_bytes}: damaged index, preprocess again"
            )
        stop = length if stop is None else stop
        if not 0 <= start <= stop <= length:
            raise ValueError(f"{self.bin_path}: item {item} has {length} elements, asked for {start} … {stop}")
        size = self.dtype.itemsize
        view = self._data[offset + start * size : offset + stop * size].view(self.dtype)
        return np.array(view, dtype=self.dtype, copy=True, subok=False)

    def verify(self) -> None:
        """Checks every pointer: items follow each other without gap or overlap; else ValueError with the first."""
        expected = 0
        for start in range(0, len(self), _BLOCK):
            lengths = np.asarray(self.lengths[start : start + _BLOCK], dtype=np.int64)
            offsets = np.asarray(self._offsets[start : start + _BLOCK])
            ends = expected + np.cumsum(lengths * self.dtype.itemsize)
            wrong = np.flatnonzero((offsets != np.concatenate(([expected], ends[:-1]))) | (lengths < 0))
            if wrong.size:
                raise ValueError(
                    f"{self.idx_path}: item {start + int(wrong[0])} is at byte {int(offsets[wrong[0]])}, not "
                    "behind the item before it: damaged index, preprocess again"
                )
            expected = int(ends[-1])
