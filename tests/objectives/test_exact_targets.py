"""The exact targets against brute force, and the property that makes them exact: products over a token's bytes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from megabyte_distill.alphabet import END_OF_DOCUMENT_CLASS, JOINT_CLASSES, joint_class
from megabyte_distill.data.packing import PackedRow, Segment, pack_row
from megabyte_distill.data.token_bytes import TokenBytes
from megabyte_distill.objectives import exact_targets as module
from megabyte_distill.objectives.byte_tree import ByteTree
from megabyte_distill.objectives.exact_targets import ExactTargets, exact_targets

TOKENS: list[bytes | None] = [
    None,  # 0 end of text
    b"a",
    b"ab",
    b"abc",
    b"b",
    b"bc",
    b"ab",  # 6 the same bytes as 2
    "日".encode(),
    "日".encode()[:1],
    "日".encode()[:2],
    b"\xfe",  # 10 reads as BOS: excluded
    b"\xff\xfe",
    None,  # 12 special
    b"c",
    b"\x97",
    b"\xa5",
    b"ab\0",
    b"\xc3(",  # 17 no UTF-8
    b"abcab",
    b"\xf5",  # bytes that no UTF-8 has, but 254 and 255, are text like others
    b"\xc0\xf5",
]
TABLE = TokenBytes.from_list(TOKENS, end_of_text_id=0, bos_id=None)
ALLOWED = [i for i, token in enumerate(TOKENS) if token and not any(byte >= 254 for byte in token)]
TEXT = [3, 1, 7, 8, 14, 15, 16, 6, 17, 5, 18, 13, 9, 15, 20, 19]
"""Tokens of a row: characters whole and split, a duplicate, NUL, bytes that are no UTF-8."""


def row_of(tokens: list[int], *, cut: int | None = None) -> PackedRow:
    """A row of one document's tokens, perhaps cut before ``cut`` more tokens."""

    def piece(token: int) -> bytes:
        return TOKENS[token] or b""

    text = b"".join(piece(token) for token in tokens)
    segment = Segment(
        document=0,
        byte_ids=np.frombuffer(text, dtype=np.uint8),
        tokens=np.array(tokens),
        token_lengths=np.array([len(piece(token)) for token in tokens]),
        next_byte=None if cut is None else piece(cut)[0],
        next_token=cut,
        next_token_length=None if cut is None else len(piece(cut)),
    )
    return pack_row([segment], row_bytes=len(text) + 4, chunk_bucket=4, start_id=0, end_of_text_id=0)


def some_logits(row: PackedRow, scale: float, seed: int = 0) -> Tensor:
    return scale * torch.randn(row.tokens.shape[0], len(TOKENS), generator=torch.Generator().manual_seed(seed))


def brute_force(logits: Tensor, prefix: bytes) -> Tensor:
    """[512] by the definition, token by token."""
    p = logits.double().softmax(-1)
    target = torch.zeros(JOINT_CLASSES, dtype=torch.float64)
    for index in ALLOWED:
        token = TOKENS[index]
        assert token is not None
        if len(token) > len(prefix) and token.startswith(prefix):
            byte = token[len(prefix)]
            target[joint_class(byte, int(len(token) == len(prefix) + 1))] += p[index]
    if not prefix:
        target[END_OF_DOCUMENT_CLASS] += p[0]
    return target / target.sum()


def targets_of(row: PackedRow, logits: Tensor, bits: Tensor | None = None) -> ExactTargets:
    return exact_targets(
        ByteTree.of(TABLE),
        logits,
        byte_ids=row.byte_ids,
        bits=row.bits if bits is None else bits,
        labels=row.labels,
        wanted=row.is_real,
    )


@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_targets_equal_the_definition_on_every_byte(scale: float) -> None:
    row = row_of(TEXT)
    logits = some_logits(row, scale)
    found = targets_of(row, logits)
    assert int(found.replaced) == 0 and found.chunks == 1 + len(TEXT)
    chunk, prefix = -1, b""
    for place, (byte, bit, real) in enumerate(
        zip(row.byte_ids.tolist(), row.bits.tolist(), row.is_real.tolist(), strict=True)
    ):
        if not real:
            assert not found.distribution[place].any()
            continue
        chunk, prefix = (chunk + 1, b"") if bit else (chunk, prefix + bytes([byte]))
        expected = brute_force(logits[chunk], prefix)
        torch.testing.assert_close(found.distribution[place].double(), expected, atol=1e-6, rtol=0)


def test_the_product_over_a_tokens_bytes_is_the_teachers_probability() -> None:
    row = row_of(TEXT, cut=7)
    logits = some_logits(row, 4.0, seed=1)
    picked = targets_of(row, logits).distribution.gather(1, row.labels[:, None])[:, 0].double().log()
    p = logits.double().log_softmax(-1)
    allowed = torch.tensor([*ALLOWED, 0])
    chunks = row.bits.to(torch.int64).cumsum(0) - 1
    for chunk, token in enumerate(row.token_labels.tolist()[: len(TEXT)]):  # behind the last the row is cut
        here = (chunks == chunk) & row.is_real
        same = [i for i in ALLOWED if TOKENS[i] == TOKENS[token]]
        expected = p[chunk, same].logsumexp(0) - p[chunk, allowed].logsumexp(0)
        assert float(picked[here].sum()) == pytest.approx(float(expected), abs=1e-5)


def test_the_end_of_text_is_the_end_of_the_document() -> None:
    row = row_of([1])
    logits = torch.zeros(row.tokens.shape[0], len(TOKENS))
    logits[1, 0] = 5.0
    share = math.exp(5) / (math.exp(5) + len(ALLOWED))
    assert float(targets_of(row, logits).distribution[1, END_OF_DOCUMENT_CLASS]) == pytest.approx(share, rel=1e-5)


def test_mass_of_tokens_that_cannot_be_text_is_left_out_and_reported() -> None:
    row = row_of(TEXT)
    logits = some_logits(row, 3.0)
    found = targets_of(row, logits)
    logits[: int(found.chunks), [10, 11, 12]] += 2.0
    more = targets_of(row, logits)
    torch.testing.assert_close(more.distribution, found.distribution)
    excluded = logits.double().softmax(-1)[: int(found.chunks), [10, 11, 12]].sum()
    assert float(more.excluded) == pytest.approx(float(excluded), rel=1e-6) and more.excluded > 2 * found.excluded


def test_where_the_teacher_has_no_opinion_the_hard_label_stands() -> None:
    row = row_of([3])
    logits = torch.zeros(row.tokens.shape[0], len(TOKENS))
    logits[0, 4] = 60.0  # after BOS nothing but "b", and the text goes on with "abc"
    found = targets_of(row, logits)
    assert int(found.replaced) == 2  # behind "a" and "ab", that is before "b" and "c"
    assert all(found.distribution[place, int(row.labels[place])] == 1.0 for place in (1, 2))
    assert torch.allclose(found.distribution[row.is_real].sum(-1), torch.ones(int(row.is_real.sum())))


def test_a_segmentation_that_no_token_spells_gets_the_hard_label() -> None:
    row = row_of([13, 4])
    bits = row.bits.clone()
    bits[1] = False  # "cb" would be one token, which there is not
    found = targets_of(row, torch.zeros(row.tokens.shape[0], len(TOKENS)), bits)
    assert int(found.replaced) == 1 and float(found.distribution[1, int(row.labels[1])]) == 1.0


def test_rows_are_the_same_whatever_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    row = row_of(TEXT)
    logits = some_logits(row, 1.0, seed=2)
    whole = targets_of(row, logits)
    monkeypatch.setattr(module, "_CPU_BLOCK_ENTRIES", 3 * len(TOKENS))
    parts = targets_of(row, logits)
    assert torch.equal(parts.distribution, whole.distribution) and parts.replaced == whole.replaced
    assert float(parts.excluded) == pytest.approx(float(whole.excluded), rel=1e-12)
