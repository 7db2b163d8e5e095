"""The loss of merged chunks: the teacher's bytes and the text's own bit, against its definition in fp64."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from megabyte_distill.alphabet import BYTE_VOCAB, END_OF_DOCUMENT_CLASS, JOINT_CLASSES, joint_class
from megabyte_distill.data import chunk_merging
from megabyte_distill.data.chunk_merging import merge_row
from megabyte_distill.data.packing import PackedRow, Segment, pack_row
from megabyte_distill.kernels.ops import joint_cross_entropy
from megabyte_distill.objectives.merged_ce import bytes_and_bit_nll, given_own_bits

BYTES = 40


def by_definition(logits: Tensor, labels: Tensor, distribution: Tensor) -> Tensor:
    q = logits.double().softmax(-1)
    of_byte = q[:, :BYTE_VOCAB] + q[:, BYTE_VOCAB:]
    teacher = (distribution[:, :BYTE_VOCAB] + distribution[:, BYTE_VOCAB:]).double()
    bit = q.gather(1, labels[:, None]) / of_byte.gather(1, labels[:, None] % BYTE_VOCAB)
    return -(teacher * of_byte.log()).sum(-1) - bit[:, 0].log()


@pytest.fixture
def case() -> tuple[Tensor, Tensor, Tensor]:
    """Logits, labels and distributions, peaked ones and none among them."""
    torch.manual_seed(4)
    logits = 3 * torch.randn(BYTES, JOINT_CLASSES)
    distribution = (6 * torch.randn(BYTES, JOINT_CLASSES)).softmax(-1)
    distribution[:4] = 0.0  # PAD: no target
    return logits, torch.randint(0, JOINT_CLASSES, (BYTES,)), distribution


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-5), (torch.bfloat16, 4e-3)])
def test_value_and_gradient_are_those_of_the_definition(
    case: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype, tolerance: float
) -> None:
    logits, labels, distribution = case
    own = logits.to(dtype).requires_grad_()
    exact = own.detach().double().requires_grad_()
    weights = torch.randn(BYTES)
    found, expected = bytes_and_bit_nll(own, labels, distribution), by_definition(exact, labels, distribution)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=2e-5)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    assert own.grad is not None and exact.grad is not None and own.grad.dtype == dtype
    torch.testing.assert_close(own.grad.double(), exact.grad, rtol=tolerance, atol=tolerance)


def test_autograd_agrees_with_finite_differences(case: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, labels, distribution = (value[4:6] for value in case)
    own = logits.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: bytes_and_bit_nll(x, labels, distribution.double()), own, fast_mode=True)


def test_with_a_sure_teacher_it_is_the_joint_nll(case: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, labels, _ = case
    # of the two bits the teacher may be sure of either: it is not asked
    sure = torch.nn.functional.one_hot(labels % BYTE_VOCAB + BYTE_VOCAB * (labels % 2), JOINT_CLASSES).float()
    torch.testing.assert_close(bytes_and_bit_nll(logits, labels, sure), joint_cross_entropy(logits, labels))


def test_in_the_mean_over_the_teachers_bytes_it_is_the_cross_entropy_with_them(
    case: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Each byte with a bit of its own, as a merging gives it."""
    torch.manual_seed(1)
    logits, teacher = case[0][:1].double(), torch.rand(BYTE_VOCAB).double()
    teacher /= teacher.sum()
    every = torch.arange(BYTE_VOCAB)
    labels = every + BYTE_VOCAB * torch.randint(0, 2, (BYTE_VOCAB,))
    distribution = torch.cat((teacher, torch.zeros(BYTE_VOCAB))).expand(BYTE_VOCAB, -1)
    losses = bytes_and_bit_nll(logits.expand(BYTE_VOCAB, -1), labels, distribution)
    expected = -(teacher * logits.log_softmax(-1)[0, labels]).sum()
    torch.testing.assert_close((teacher * losses).sum(), expected)


TOKENS = (b"a", b"b", b" a", b"ab")
END = len(TOKENS)
LONGEST_TEXT = 3
"""Tokens; a longer text is cut."""


def probabilities() -> Tensor:
    """[5, 5] of the next token, the last one the end of text, by the token before (the last one: none)."""
    torch.manual_seed(6)
    return torch.rand(END + 1, END + 1, dtype=torch.float64).softmax(-1)


def every_text(next_token: Tensor) -> Iterator[tuple[float, list[int], int]]:
    """(probability, tokens, the one behind them or END) of all texts, long ones cut."""
    begun: list[tuple[float, list[int]]] = [(1.0, [])]
    while begun:
        mass, tokens = begun.pop()
        for token, p in enumerate(next_token[tokens[-1] if tokens else END].tolist()):
            if token == END or len(tokens) == LONGEST_TEXT:
                yield mass * p, tokens, token
            else:
                begun.append((mass * p, [*tokens, token]))


def row_of(tokens: list[int], after: int) -> PackedRow:
    text = b"".join(TOKENS[token] for token in tokens)
    segment = Segment(
        document=0,
        byte_ids=np.frombuffer(text, dtype=np.uint8),
        tokens=np.array(tokens, dtype=np.int64),
        token_lengths=np.array([len(TOKENS[token]) for token in tokens], dtype=np.int64),
        next_byte=None if after == END else TOKENS[after][0],
        next_token=None if after == END else after,
        next_token_length=None if after == END else len(TOKENS[after]),
    )
    return pack_row([segment], row_bytes=1 + len(text), chunk_bucket=1, start_id=0, end_of_text_id=0)


def teachers_pairs(next_token: Tensor, tokens: list[int]) -> Tensor:
    """[P, 512] of each byte, by the tokens before it and what has begun of its own."""
    pairs, before = [], END
    for token in [*tokens, END]:
        spelled = TOKENS[token] if token < END else b" "
        for size in range(len(spelled)):
            of_byte = torch.zeros(JOINT_CLASSES, dtype=torch.float64)
            of_byte[END_OF_DOCUMENT_CLASS] = next_token[before, END] if not size else 0.0
            for number, other in enumerate(TOKENS):
                if len(other) > size and other[:size] == spelled[:size]:
                    of_byte[joint_class(other[size], int(len(other) == size + 1))] += next_token[before, number]
            pairs.append(of_byte / of_byte.sum())
        before = token
    return torch.stack(pairs)


@pytest.mark.parametrize("longest", [1, 4])
@pytest.mark.parametrize("limit", [1.2, 2.3])
def test_it_is_least_at_how_likely_pairs_are_behind_the_students_own_bits(
    limit: float, longest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All texts of a small teacher: behind the same bytes and merged bits, the true pairs have no gradient."""
    monkeypatch.setattr(chunk_merging, "LONGEST", longest)
    next_token = probabilities()
    histories: dict[tuple[tuple[int, ...], tuple[bool, ...]], int] = {}
    places: list[int] = []
    parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for mass, tokens, after in every_text(next_token):
        row = merge_row(row_of(tokens, after), limit)
        pairs = teachers_pairs(next_token, tokens)
        weights = torch.full((pairs.shape[0],), mass, dtype=torch.float64)
        parts.append((weights, row.labels, given_own_bits(pairs.clone(), row), pairs))
        byte_ids, bits = row.byte_ids.tolist(), row.bits.tolist()
        keys = ((tuple(byte_ids[:size]), tuple(bits[:size])) for size in range(1, len(bits) + 1))
        places += [histories.setdefault(key, len(histories)) for key in keys]
    weights, labels, conditioned, as_they_were = (torch.cat(part) for part in zip(*parts, strict=True))
    place = torch.tensor(places)
    true = torch.zeros(len(histories), JOINT_CLASSES, dtype=torch.float64)
    true.index_put_((place, labels), weights, accumulate=True)
    true /= true.sum(-1, keepdim=True)

    def gradient(distribution: Tensor) -> float:
        logits = true.clamp(min=1e-14).log().requires_grad_()
        (bytes_and_bit_nll(logits[place], labels, distribution) * weights).sum().backward()
        assert logits.grad is not None
        return float(logits.grad.abs().max())

    assert gradient(conditioned) < 1e-10
    assert gradient(as_they_were) > 1e-3  # the end of text
