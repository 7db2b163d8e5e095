"""Bulk reading against reading line by line."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megabyte_distill.data.arrow_text import is_utf8, json_items
from megabyte_distill.data.encoding import EncodeJob, encode_batch
from megabyte_distill.data.readers import RawBatch, RecordKind
from megabyte_distill.data.records import InvalidRecordError, OnInvalid, texts_of
from megabyte_distill.data.tokenizers import TokenizerKind

BOS = b"\xfe"
ROW = (
    b'{"text":"a"}',
    rb'{"n": 1, "text": "\u0000\n\ud83d\ude00 \"q\" \\", "x": [1, {"text": "no"}]}',
    '{"text":"日本語 العربية e\u0301"}'.encode(),
    b'{"text":"","n":NaN}',
)
STRANGE = (
    b"",
    b" ",
    b'{"text":"a"}{"text":"b"}',
    b'{"text":"a"} ',
    b'{"text":null}',
    b'{"text":1}',
    b'{"n":1}',
    b'{"text":"a","text":"b"}',
    rb'{"text":"\ud800"}',
    rb'{"text":"a","n":"\udc00"}',
    b'{"text":"\xff"}',
    b'{"text":"a","n":"\xff"}',
    b'{"text":"a"',
    b'"text"}',
    b"[]",
    b'{"text":"\t"}',
    b'{"text":"a","n":01}',
    b'{"text":"a",}',
    b'{"text":"a"}\r',
    b'\xef\xbb\xbf{"text":"a"}',
    b'{"text":"a","n":Inf}',
    b'{"text":"a","n":-NaN}',
    b'{"text":"a","n":' + b"[" * 2000 + b"]" * 2000 + b"}",
    b'{"text":"a","n":Infinit}',
)


def line_by_line(lines: bytes) -> list[str] | None:
    """The slow definition; None where a line is not as it should be."""
    batch = RawBatch(kind=RecordKind.JSON, names=("f",), pieces=(lines,))
    try:
        return [texts_of(line, batch, ["text"], OnInvalid.ERROR)[0] for line in batch.payloads()]
    except InvalidRecordError:
        return None


def in_bulk(lines: bytes) -> list[str] | None:
    found = json_items(lines, ["text"], BOS)
    if found is None:
        return None
    content, lengths = found[0]
    items = np.split(content, np.cumsum(lengths)[:-1]) if lengths.size else []
    assert all(item[0] == BOS[0] for item in items) and int(lengths.sum()) == content.size
    return [item[1:].tobytes().decode() for item in items]


def test_what_is_as_it_should_be_is_read_in_bulk() -> None:
    for end in (b"", b"\n"):
        lines = b"\n".join(ROW) + end
        assert in_bulk(lines) == line_by_line(lines) != None  # noqa: E711


@pytest.mark.parametrize("line", STRANGE)
@pytest.mark.parametrize("place", [0, 1, 4])
def test_what_is_not_is_left_to_the_slow_way_or_read_alike(line: bytes, place: int) -> None:
    rows = [*ROW[:place], line, *ROW[place:]]
    lines = b"\n".join(rows) + b"\n"
    found = in_bulk(lines)
    assert found is None or found == line_by_line(lines)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(st.sampled_from(ROW), st.sampled_from(STRANGE), st.binary(max_size=6)), max_size=5))
def test_any_lines_are_read_as_one_by_one_or_not_at_all(rows: list[bytes]) -> None:
    lines = b"\n".join(rows)
    found = in_bulk(lines)
    assert found is None or found == line_by_line(lines)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(), min_size=1, max_size=5), st.booleans())
def test_any_texts_come_back(texts: list[str], ascii_only: bool) -> None:
    texts = [text.encode("utf-8", "replace").decode() for text in texts]
    lines = "\n".join(json.dumps({"text": text}, ensure_ascii=ascii_only) for text in texts).encode()
    assert in_bulk(lines) == texts


def test_windows_line_ends_are_read_in_bulk() -> None:
    lines = b"\r\n".join(ROW) + b"\r\n"
    assert in_bulk(lines) == line_by_line(lines) != None  # noqa: E711


def test_objects_over_several_lines_are_no_lines() -> None:
    # as many objects as lines, and none of these lines is one
    assert in_bulk(b'{"text":"a"}{"text":\n"b"}') is None
    assert in_bulk(b'{"text":"a"}{"n":{}\n,"text":"b"}') is None


def test_the_two_ways_count_the_same() -> None:
    job = EncodeJob(tokenizer_kind=TokenizerKind.NONE, on_invalid=OnInvalid.SKIP)
    good = RawBatch(kind=RecordKind.JSON, names=("f",), pieces=(b"\n".join(ROW),))
    mixed = RawBatch(kind=RecordKind.JSON, names=("f",), pieces=(b"\n\n{}\n" + ROW[0][:5], ROW[0][5:] + b"\n"))
    assert encode_batch(job, good).by_key[0].byte_lengths.size == len(ROW) and not encode_batch(job, good).skipped
    encoded = encode_batch(job, mixed)
    assert encoded.by_key[0].byte_ids.tobytes() == BOS + b"a"
    assert dict(encoded.skipped.counts) == {"blank lines": 2, "missing key": 1}


@pytest.mark.parametrize(
    "text", [b"", b"a", "é日😀".encode(), b"\xff", b"\xed\xa0\x80", "é".encode()[:1], b"a\x00b\xc3\xa9"]
)
def test_utf8_is_told_from_what_is_not(text: bytes) -> None:
    try:
        text.decode()
        wanted = True
    except UnicodeDecodeError:
        wanted = False
    assert is_utf8(text) == wanted
