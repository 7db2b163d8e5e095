"""The exact targets against brute force, and the property that makes them exact: products over a token's bytes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megabyte_distill.alphabet import END_OF_DOCUMENT_CLASS, JOINT_CLASSES, joint_class
from megabyte_distill.data.packing import PackedRow, Segment, pack_row
from megabyte_distill.data.token_bytes import TokenBytes
from megabyte_distill.objectives import exact_targets as module
from megabyte_distill.objectives.byte_tree import ByteTree
from megabyte_distill.objectives.exact_targets import exact_targets

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
]
TABLE = TokenBytes.from_list(TOKENS, end_of_text_id=0, bos_id=None)
ALLOWED = [i for i, token in enumerate(TOKENS) if token and not any(byte >= 254 for byte in token)]


def row_of(tokens: list[int], *, cut: int | None = None) -> PackedRow:
    """A row of one document's tokens, perhaps cut before ``cut`` more tokens."""

    def piece(token: int) -> bytes:
        return TOKENS[token] or b""

    text = b"".join(piece(token) for token in tokens)
    import numpy as np

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


def targets_of(row: PackedRow, logits: Tensor) -> tuple[Tensor, int]:
    found = exact_targets(
        ByteTree.of(TABLE), logits, byte_ids=row.byte_ids, bits=row.bits, labels=row.labels, wanted=row.loss_mask
    )
    return found.distribution, int(found.replaced)


@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_targets_equal_the_definition_on_every_byte(scale: float) -> None:
    row = row_of([3, 1, 7, 8, 14, 15, 6, 5, 13, 9, 15])
    logits = scale * torch.randn(row.tokens.shape[0], len(TOKENS), generator=torch.Generator().manual_seed(0))
    found, replaced = targets_of(row, logits)
    assert replaced == 0
    chunk, prefix = -1, b""
    for place, (byte, bit, real) in enumerate(
        zip(row.byte_ids.tolist(), row.bits.tolist(), row.loss_mask.tolist(), strict=True)
    ):
        if not real:
            assert not found[place].any()
            continue
        chunk, prefix = (chunk + 1, b"") if bit else (chunk, prefix + bytes([byte]))
        torch.testing.assert_close(found[place].double(), brute_force(logits[chunk], prefix), atol=1e-6, rtol=0)


def test_the_product_over_a_tokens_bytes_is_the_teachers_probability() -> None:
    row = row_of([3, 1, 7, 8, 14, 15, 6, 5, 13, 9, 15], cut=7)
    logits = 4.0 * torch.randn(row.tokens.shape[0], len(TOKENS), generator=torch.Generator().manual_seed(1))
    found, _ = targets_of(row, logits)
    picked = found.gather(1, row.labels[:, None])[:, 0].double().log()
    p = logits.double().log_softmax(-1)
    allowed = torch.tensor([*ALLOWED, 0])
    chunks = row.bits.to(torch.int64).cumsum(0) - 1
    labels = row.token_labels.tolist()
    for chunk in range(int(row.token_mask.sum())):
        token = labels[chunk]
        here = (chunks == chunk) & row.loss_mask
        if chunk == int(row.token_mask.sum()) - 1:
            continue  # the row is cut inside what follows: its other bytes are not in it
        same = [i for i in ALLOWED if TOKENS[i] == TOKENS[token]]
        expected = p[chunk, same].logsumexp(0) - p[chunk, allowed].logsumexp(0)
        assert float(picked[here].sum()) == pytest.approx(float(expected), abs=1e-5)


def test_the_end_of_text_is_the_end_of_the_document() -> None:
    row = row_of([1])
    logits = torch.zeros(row.tokens.shape[0], len(TOKENS))
    logits[1, 0] = 5.0
    found, _ = targets_of(row, logits)
    share = math.exp(5) / (math.exp(5) + len(ALLOWED))
    assert float(found[1, END_OF_DOCUMENT_CLASS]) == pytest.approx(share, rel=1e-5)


def test_where_the_teacher_has_no_opinion_the_hard_label_stands() -> None:
    row = row_of([3])
    logits = torch.zeros(row.tokens.shape[0], len(TOKENS))
    logits[0, 4] = 60.0  # after BOS nothing but "b", and the text goes on with "abc"
    found, replaced = targets_of(row, logits)
    assert replaced == 2  # behind "a" and "ab", that is before "b" and "c"
    assert found[1, int(row.labels[1])] == 1.0 and found[2, int(row.labels[2])] == 1.0
    assert torch.allclose(found[row.loss_mask].sum(-1), torch.ones(int(row.loss_mask.sum())))


def test_a_segmentation_that_no_token_spells_gets_the_hard_label() -> None:
    row = row_of([13, 4])
    bits = row.bits.clone()
    bits[1] = False  # "cb" would be one token, which there is not
    found = exact_targets(
        ByteTree.of(TABLE),
        torch.zeros(row.tokens.shape[0], len(TOKENS)),
        byte_ids=row.byte_ids,
        bits=bits,
        labels=row.labels,
        wanted=row.loss_mask,
    )
    assert int(found.replaced) == 1 and float(found.distribution[1, int(row.labels[1])]) == 1.0


@pytest.mark.parametrize("vocabulary", [300, 5000])
def test_large_peaked_distributions_telescope(vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    pieces = {bytes([byte]) for byte in range(128)}
    while len(pieces) < vocabulary:
        size = int(torch.randint(1, 9, (), generator=generator))
        pieces.add(bytes(torch.randint(97, 103, (size,), generator=generator).tolist()))
    tokens: list[bytes | None] = [None, *sorted(pieces)]
    table = TokenBytes.from_list(tokens, end_of_text_id=0, bos_id=None)
    tree = ByteTree.of(table)
    logits = 12.0 * torch.randn(1, len(tokens), generator=generator)
    p = logits.double().log_softmax(-1)[0]
    for token in torch.randint(1, len(tokens), (60,), generator=generator).tolist():
        piece = tokens[token]
        assert piece is not None
        byte_ids = torch.tensor([254, *piece])
        bits = torch.tensor([True, *[False] * (len(piece) - 1), True])
        labels = torch.tensor([joint_class(byte, int(i == len(piece) - 1)) for i, byte in enumerate(piece)] + [510])
        wanted = torch.tensor([True] * len(piece) + [False])
        found = exact_targets(tree, logits.repeat(2, 1), byte_ids=byte_ids, bits=bits, labels=labels, wanted=wanted)
        if int(found.replaced):
            continue  # a prefix below 1e-12
        product = float(found.distribution[:-1].gather(1, labels[:-1, None]).double().log().sum())
        if float(p[token]) > -25:
            assert product == pytest.approx(float(p[token]), abs=1e-4)


def test_rows_are_the_same_whatever_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    row = row_of([3, 1, 7, 8, 14, 15, 6, 5, 13, 9, 15])
    logits = torch.randn(row.tokens.shape[0], len(TOKENS), generator=torch.Generator().manual_seed(2))
    whole, _ = targets_of(row, logits)
    monkeypatch.setattr(module, "_MASS_ENTRIES", 3 * len(TOKENS))
    assert torch.equal(targets_of(row, logits)[0], whole)
