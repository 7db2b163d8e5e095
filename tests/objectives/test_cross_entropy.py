"""Cross-entropy over joint classes and over tokens, and the bits per byte that both report."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from megabyte_distill.alphabet import END_OF_DOCUMENT_CLASS, JOINT_CLASSES
from megabyte_distill.data.packing import PackedRow
from megabyte_distill.objectives.joint_ce import joint_bits_pair, joint_nll
from megabyte_distill.objectives.token_ce import TokenCrossEntropy, token_nll
from tests.tiny_student import VOCAB_SIZE, padded_row


@pytest.fixture
def row() -> PackedRow:
    return padded_row()


def test_joint_nll_equals_log_softmax_of_the_label(row: PackedRow) -> None:
    logits = torch.randn(row.labels.shape[0], JOINT_CLASSES) * 3
    expected = -logits.log_softmax(-1).gather(1, row.labels[:, None])[:, 0]
    torch.testing.assert_close(joint_nll(logits, row), expected)
    assert joint_nll(logits.bfloat16(), row).dtype is torch.float32


def test_joint_bits_leave_out_pad_and_document_ends(row: PackedRow) -> None:
    nll = torch.full((row.labels.shape[0],), math.log(2))
    nll[~row.is_real] = math.nan
    nll[row.labels == END_OF_DOCUMENT_CLASS] = 1e9
    nll[row.cu_seqlens[1:].long() - 1] = 1e9
    bits, count = joint_bits_pair(nll, row)
    assert count == int(row.is_real.sum()) - len(row.documents)
    assert float(bits) == pytest.approx(count)


def test_a_uniform_model_pays_nine_bits_a_byte(row: PackedRow) -> None:
    bits, count = joint_bits_pair(joint_nll(torch.zeros(row.labels.shape[0], JOINT_CLASSES), row), row)
    assert float(bits) / count == pytest.approx(9.0)


def test_token_nll_equals_log_softmax_of_the_label() -> None:
    logits, labels = torch.randn(6, 11), torch.tensor([0, 3, 10, 1, 1, 7])
    torch.testing.assert_close(token_nll(logits, labels), -logits.log_softmax(-1).gather(1, labels[:, None])[:, 0])


class Table(nn.Module):
    """A token model with a bigram table for a brain."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(VOCAB_SIZE, VOCAB_SIZE))

    def embed(self, tokens: Tensor) -> Tensor:
        return self.table[tokens]

    def forward(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden


def test_the_token_objective_sums_every_real_label_and_reports_text_alone(row: PackedRow) -> None:
    model, objective = Table(), TokenCrossEntropy()
    losses = objective.losses(model, row)
    nll = -model.table.log_softmax(-1)[row.tokens, row.token_labels]
    torch.testing.assert_close(losses["lm loss"], nll[row.token_mask].sum())
    assert objective.counts(row) == {"lm loss": int(row.token_mask.sum())}
    last = torch.zeros_like(row.token_mask)
    last[row.cu_chunks[1 : len(row.documents) + 1].long() - 1] = True
    bits, size = objective.measures()["bits per byte"]
    torch.testing.assert_close(bits, nll[row.token_mask & ~last].sum().detach() / math.log(2))
    assert size == int(row.is_real.sum()) - len(row.documents)


def test_the_token_objective_sees_through_a_wrapper(row: PackedRow) -> None:
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    model = Table()
    bare = TokenCrossEntropy().losses(model, row)["lm loss"]
    assert torch.equal(TokenCrossEntropy().losses(Wrapper(model), row)["lm loss"], bare)
