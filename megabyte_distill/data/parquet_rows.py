"""Rows of parquet files."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow
import pyarrow.parquet

from megabyte_distill.data.compressed import BLOCK_BYTES
from megabyte_distill.data.inputs import Compression, InputFile

_ROWS = 256
"""Decoded at a time, at most: a dictionary page may hide how long they are."""
_SLICE = 32
"""Rows of these that are made Python objects at a time, where they are long."""


def parquet_rows(
    file: InputFile, plain: io.BufferedReader[Any], keys: Sequence[str]
) -> Iterator[tuple[tuple[bytes | None, ...], int]]:
    """The keys' columns row by row, as bytes whatever string type they have, and each row's size in bytes.

    ``plain`` reads the same file for its hash and follows. ValueError names a file that is damaged or has no such
    column.
    """
    if file.may_wait or file.compression is not Compression.NONE:
        raise ValueError(f"{file.name}: a parquet file is read from its end; give it uncompressed and by its path")
    try:
        with pyarrow.parquet.ParquetFile(file.path, buffer_size=BLOCK_BYTES) as table:
            names = table.schema_arrow.names
            for key in keys:
                if (count := names.count(key)) != 1:
                    found = f"{count} columns" if count else "no column"
                    raise ValueError(f"{file.name}: {found} {key!r}; it has {', '.join(map(repr, names))}")
            yield from _rows(table, file, plain, keys)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{file.name}: cannot be read as parquet ({error}): damaged or truncated") from error


def _rows(
    table: Any, file: InputFile, plain: io.BufferedReader[Any], keys: Sequence[str]
) -> Iterator[tuple[tuple[bytes | None, ...], int]]:
    """``plain`` follows at the pace of the row groups."""
    behind = followed = 0
    for group in range(table.num_row_groups):
        stored = table.metadata.row_group(group)
        columns = [stored.column(index) for index in range(stored.num_columns)]
        size = sum(column.total_uncompressed_size for column in columns if column.path_in_schema in keys)
        rows = max(1, min(_ROWS, BLOCK_BYTES * stored.num_rows // max(size, 1)))
        wanted = list(dict.fromkeys(keys))
        compressed, done = sum(column.total_compressed_size for column in columns), 0
        for part in table.iter_batches(batch_size=rows, row_groups=[group], columns=wanted):
            step = _ROWS if part.nbytes <= 4 * BLOCK_BYTES else _SLICE
            for start in range(0, part.num_rows, step):
                texts = [_text_column(part.slice(start, step), key, file) for key in keys]
                for row in zip(*texts, strict=True):
                    yield row, sum(map(len, filter(None, row)))
            done += part.num_rows
            place = behind + compressed * done // max(stored.num_rows, 1)
            while followed < place and (piece := plain.read(min(place - followed, BLOCK_BYTES))):
                followed += len(piece)
        behind += compressed


def _is_not(kind: Any) -> bool:
    """Of a kind that the installed pyarrow does not know yet."""
    return False


def _text_column(part: Any, key: str, file: InputFile) -> list[bytes | None]:
    column = part.column(key)
    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    kinds = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")
    if not any(getattr(pyarrow.types, f"is_{kind}", _is_not)(column.type) for kind in kinds):
        raise ValueError(f"{file.name}: column {key!r} is {column.type}, expected text")
    texts: list[bytes | None] = column.cast(pyarrow.large_binary()).to_pylist()
    return texts
