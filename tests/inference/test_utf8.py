"""The automaton of UTF-8 against Python's own codec."""

from __future__ import annotations

import codecs
import random
from collections import defaultdict

import pytest
import torch

from megabyte_distill.alphabet import BOS_BYTE, PAD_BYTE
from megabyte_distill.inference.utf8 import Utf8Rows, count_invalid

CPU = torch.device("cpu")


def test_after_every_beginning_of_every_character_the_allowed_bytes_are_those_of_characters() -> None:
    following: dict[bytes, set[int]] = defaultdict(set)
    for code_point in range(0x110000):
        if not 0xD800 <= code_point < 0xE000:
            encoded = chr(code_point).encode()
            for size in range(len(encoded)):
                following[encoded[:size]].add(encoded[size])
    following[b""].add(BOS_BYTE)
    allowed = Utf8Rows(following, CPU).allowed()
    assert len(following) > 16_000
    for beginning, row in zip(following, allowed, strict=True):
        assert set(row.nonzero()[:, 0].tolist()) == following[beginning], beginning


@pytest.mark.parametrize(
    ("text", "beginning"),
    [
        (b"\x80\x80\x80\x80", b""),
        (b"\xe6\x97\xe6", b"\xe6"),
        (b"\xe6\x97a", b""),
        (b"\xc0\xaf", b""),  # overlong
        (b"\xed\xa0", b""),  # a surrogate
        (b"\xf5\x80", b""),
        (b"\xf0\x9f\x98", b"\xf0\x9f\x98"),
        (b"\xff" * 9 + b"\xe2\x82", b"\xe2\x82"),
    ],
)
def test_broken_texts_leave_a_reader_where_a_character_begins(text: bytes, beginning: bytes) -> None:
    got, wanted = Utf8Rows([text, beginning], CPU).allowed()
    assert torch.equal(got, wanted)


def test_reading_on_equals_reading_at_once() -> None:
    text = "aé日🙂".encode()
    rows = Utf8Rows([b""], CPU)
    for size, byte in enumerate(text, start=1):
        rows.read(torch.tensor([byte]))
        assert torch.equal(rows.allowed(), Utf8Rows([text[:size]], CPU).allowed())


def test_invalid_bytes_are_those_that_the_codec_leaves_out() -> None:
    choose = random.Random(0)
    pieces = [b"a", "é".encode(), "日".encode(), "🙂".encode(), b"\xe6\x97", b"\xf0", b"\x97", b"\xed\xa0\x80", b"\xc0"]
    for _ in range(500):
        text = b"".join(choose.choices(pieces, k=choose.randrange(8)))
        left_out = len(text) - len(text.decode("utf-8", errors="ignore").encode())
        assert count_invalid(text) == left_out
        decoder = codecs.getincrementaldecoder("utf-8")("ignore")
        decoder.decode(text)
        assert count_invalid(text, ended=False) == left_out - len(decoder.getstate()[0])


def test_a_character_that_was_begun_may_be_finished() -> None:
    whole = "日".encode()
    assert count_invalid(whole[1:], begun=whole[:1]) == 0
    assert count_invalid(whole[1:]) == 2
    assert count_invalid(b"a", begun=whole[:1]) == 0


def test_padding_is_never_allowed_and_rows_are_kept_in_order() -> None:
    rows = Utf8Rows([b"a", b"\xe6", b"\xf0"], CPU)
    assert not rows.allowed()[:, PAD_BYTE].any()
    wanted = rows.allowed()[[2, 0]]
    rows.keep(torch.tensor([2, 0]))
    assert torch.equal(rows.allowed(), wanted)
