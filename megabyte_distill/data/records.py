"""One raw record to its texts, and what becomes of a record that is not as it should be."""

from __future__ import annotations

import json
from collections.abc import Sequence
from enum import StrEnum
from typing import Any

import orjson

from megabyte_distill.data.arrow_text import json_items
from megabyte_distill.data.readers import Payload, RawBatch, RecordKind


class OnInvalid(StrEnum):
    """What to do with a record that cannot be read."""

    ERROR = "error"
    """Stop, naming file and line."""
    SKIP = "skip"
    """Leave it out and count it by reason."""
    REPLACE = "replace"
    """Put U+FFFD where bytes are no UTF-8 or half a surrogate pair stands; skip records that are wrong otherwise."""


class InvalidRecordError(ValueError):
    """A record that cannot be read; the message has no place in it."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        """A few words to count it under."""


INVALID_UTF8, INVALID_JSON = "invalid UTF-8", "invalid JSON"
MISSING_KEY, NOT_TEXT = "missing key", "not a text"


def texts_of(payload: Payload, batch: RawBatch, keys: Sequence[str], on_invalid: OnInvalid) -> tuple[str, ...]:
    """A record's texts, one a key (plain text has one); InvalidRecordError where it has none."""
    replace = on_invalid is OnInvalid.REPLACE
    if isinstance(payload, tuple):
        return tuple(_column(value, key, replace) for value, key in zip(payload, keys, strict=True))
    if batch.kind is RecordKind.TEXT:
        return (decoded(payload, replace, names_line=batch.is_whole_files),)
    try:
        content = orjson.loads(payload)
        texts = tuple([content[key] for key in keys])
    except (orjson.JSONDecodeError, TypeError, KeyError):
        return _by_the_slow_way(payload, keys, replace)
    return texts if all(type(text) is str for text in texts) else _by_the_slow_way(payload, keys, replace)


def _by_the_slow_way(line: bytes, keys: Sequence[str], replace: bool) -> tuple[str, ...]:
    """What the fast reader refuses: NaN and half surrogate pairs, or an error to be named."""
    text = decoded(line, replace).removeprefix("\ufeff")
    try:
        content: Any = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        if (texts := _as_in_bulk(text, keys)) is not None:
            return texts
        raise InvalidRecordError(INVALID_JSON, f"invalid JSON ({error})") from error
    if not isinstance(content, dict):
        raise InvalidRecordError(INVALID_JSON, f"expected a JSON object, got {type(content).__name__}")
    return tuple(_value(content, key, replace) for key in keys)


def _as_in_bulk(line: str, keys: Sequence[str]) -> tuple[str, ...] | None:
    """What reading many lines at once takes, so that a line's fate does not hang on its neighbours: Inf, any depth."""
    try:
        columns = json_items(line.encode(), keys, b"")
    except UnicodeEncodeError:
        return None
    return None if columns is None else tuple(content.tobytes().decode() for content, _ in columns)


def _value(content: dict[str, Any], key: str, replace: bool) -> str:
    if key not in content:
        raise InvalidRecordError(MISSING_KEY, f"no key {key!r}; it has {', '.join(map(repr, content)) or 'none'}")
    value = content[key]
    if not isinstance(value, str):
        raise InvalidRecordError(NOT_TEXT, f"{key!r} is {type(value).__name__}, expected text")
    return checked_text(value, repr(key), replace)


def checked_text(value: str, what: str, replace: bool) -> str:
    """A text without half surrogate pairs: U+FFFD for each with ``replace``, else InvalidRecordError."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        if replace:
            return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        place = error.start
        raise InvalidRecordError(INVALID_UTF8, f"{what} has half a surrogate pair at character {place}") from error
    return value


def _column(value: bytes | None, key: str, replace: bool) -> str:
    if value is None:
        raise InvalidRecordError(NOT_TEXT, f"{key!r} is null, expected text")
    return decoded(value, replace)


def decoded(text: bytes, replace: bool, *, names_line: bool = False) -> str:
    """UTF-8 as text: U+FFFD where it is none with ``replace``, else InvalidRecordError."""
    try:
        return text.decode("utf-8", "replace" if replace else "strict")
    except UnicodeDecodeError as error:
        line = f", line {text.count(10, 0, error.start) + 1}" if names_line else ""
        message = f"invalid UTF-8 at byte {error.start}{line} ({error.reason})"
        raise InvalidRecordError(INVALID_UTF8, message) from error
