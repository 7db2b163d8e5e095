"""Text in bulk through Arrow, which makes no Python object a document and works beside other threads."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.json
from numpy.typing import NDArray

_MOST_BYTES = 1 << 30
"""At a time: Arrow counts in 32 bits here."""
_NEWLINE, _RETURN, _OPENING, _CLOSING = b"\n\r{}"


def is_utf8(text: bytes) -> bool:
    """Whether these bytes are UTF-8."""
    if text.isascii():
        return True
    if len(text) > _MOST_BYTES:
        try:
            text.decode()
        except UnicodeDecodeError:
            return False
        return True
    ends = np.array([0, len(text)], dtype=np.int32)
    try:
        pyarrow.StringArray.from_buffers(1, pyarrow.py_buffer(ends), pyarrow.py_buffer(text)).validate(full=True)
    except pyarrow.ArrowInvalid:
        return False
    return True


def json_items(
    lines: bytes, keys: Sequence[str], prefix: bytes
) -> list[tuple[NDArray[np.uint8], NDArray[np.int64]]] | None:
    """For each key its texts in UTF-8, each behind the prefix, one after the other, and their lengths with the prefix.

    ``lines`` hold JSON objects, one a line. None where they have to be looked at one by one: blank lines, damage, and
    what Arrow is stricter with than JSON.
    """
    if len(lines) > _MOST_BYTES or not is_utf8(lines):
        return None
    # Arrow takes objects wherever they begin. A line that begins with a bracket begins one, since none of the line
    # before, which ends in a bracket, can go on with another; so as many objects as lines are one a line.
    count = _lines_in_brackets(lines)
    if count is None:
        return None
    try:
        table = pyarrow.json.read_json(
            pyarrow.BufferReader(lines),
            read_options=pyarrow.json.ReadOptions(use_threads=False, block_size=len(lines) + 1),
            parse_options=pyarrow.json.ParseOptions(
                explicit_schema=pyarrow.schema([(key, pyarrow.string()) for key in keys]),
                unexpected_field_behavior="ignore",
            ),
        )
    except pyarrow.ArrowException:
        return None
    if table.num_rows != count:
        return None
    columns = [table.column(key).combine_chunks() for key in keys]
    return None if any(column.null_count for column in columns) else [_behind(prefix, column) for column in columns]


def _lines_in_brackets(lines: bytes) -> int | None:
    """How many lines there are; None unless each begins and ends with the brackets of a JSON object."""
    text = np.frombuffer(lines.removesuffix(b"\n"), dtype=np.uint8)
    newlines = np.flatnonzero(text == _NEWLINE)
    firsts, lasts = np.append(0, newlines + 1), np.append(newlines - 1, text.size - 1)
    if not text.size or lasts.min() < 0 or firsts.max() >= text.size:
        return None
    lasts = np.maximum(np.where(text[lasts] == _RETURN, lasts - 1, lasts), 0)
    in_brackets = (text[firsts] == _OPENING) & (text[lasts] == _CLOSING)
    return firsts.size if in_brackets.all() else None


def _behind(prefix: bytes, texts: pyarrow.StringArray) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Each text behind the prefix, one after the other, and their lengths."""
    items = pyarrow.compute.binary_join_element_wise(prefix, texts.cast(pyarrow.binary()), b"")
    _, places, content = items.buffers()
    ends = np.frombuffer(places, dtype=np.int32)[items.offset : items.offset + len(items) + 1].astype(np.int64)
    return np.frombuffer(content, dtype=np.uint8)[ends[0] : ends[-1]], np.diff(ends)
