"""The teacher as a byte model: stepping equals the packed targets, samples follow it, scores equal its token NLL."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megabyte_distill.alphabet import END_OF_DOCUMENT_CLASS
from megabyte_distill.data.packing import PackedRow
from megabyte_distill.data.text_mask import text_chunks, text_positions
from megabyte_distill.inference.scoring import score_tokens
from megabyte_distill.inference.teacher_bytes import TeacherBytes, sample_texts, score_teacher_bytes
from megabyte_distill.model.backbone import Backbone
from megabyte_distill.objectives.byte_tree import ByteTree
from megabyte_distill.objectives.exact_targets import exact_targets
from tests.objectives.test_exact_targets import ALLOWED, TABLE, TEXT, TOKENS, row_of
from tests.tiny_student import tiny_backbone, world

__all__ = ["world"]
pytestmark = pytest.mark.usefixtures("world")


@pytest.fixture
def teacher() -> Backbone:
    torch.manual_seed(1)
    return tiny_backbone(vocab_size=len(TOKENS)).requires_grad_(False)


def targets_of(teacher: Backbone, row: PackedRow) -> Tensor:
    return exact_targets(
        ByteTree.of(TABLE),
        teacher(teacher.embed(row.tokens), row.cu_chunks),
        head=teacher.own_logits,
        byte_ids=row.byte_ids,
        bits=row.bits,
        labels=row.labels,
        wanted=row.loss_mask,
    ).distribution


def test_stepping_through_texts_gives_the_targets_of_their_rows(teacher: Backbone) -> None:
    text = [token for token in TEXT if token != 6]  # spelled as 2 is: which of them is read is a choice
    rows = [row_of(text), row_of([16, *text[:-1]])]
    size = min(int(row.loss_mask.sum()) for row in rows)
    running = TeacherBytes(teacher, TABLE, rows=2)
    for place in range(size):
        for index, row in enumerate(rows):
            expected = targets_of(teacher, row)[place].double()
            torch.testing.assert_close(running.next_pairs()[index], expected, atol=1e-5, rtol=0)
        if place + 1 < size:
            byte_ids = torch.stack([row.byte_ids[place + 1] for row in rows])
            running.advance(byte_ids, torch.stack([row.bits[place + 1] for row in rows]))
    assert running.tokens == [text, [16, *text[:-2]]]
    running.keep(torch.tensor([0]))
    assert running.rows == 1 and torch.allclose(running.next_pairs()[0].sum(), torch.ones((), dtype=torch.float64))


@pytest.mark.parametrize(
    "byte, bit, what", [(ord("z"), True, "ends"), (ord("z"), False, "goes on"), (ord("c"), False, "goes on")]
)
def test_a_pair_that_no_token_has_is_refused(teacher: Backbone, byte: int, bit: bool, what: str) -> None:
    running = TeacherBytes(teacher, TABLE)
    with pytest.raises(ValueError, match=f"no token {what} with byte {byte}"):
        running.advance(torch.tensor([byte]), torch.tensor([bit]))


def test_samples_are_the_teachers_tokens(teacher: Backbone) -> None:
    """First and second tokens against the teacher's own probabilities: chi-square at its 0.1 % point."""
    count = 4000
    texts = sample_texts(teacher, TABLE, rows=count, max_new_bytes=16, seed=3)
    for text in texts[:200]:
        assert b"".join(TOKENS[token] or b"" for token in text.tokens) == text.byte_ids[: _finished(text.bits)]
        assert len(text.tokens) == sum(text.bits)
    allowed = [*ALLOWED, 0]

    def expected(context: list[int]) -> Tensor:
        tokens = torch.tensor([TABLE.start_id, *context])
        hidden = teacher(teacher.embed(tokens), torch.tensor([0, tokens.shape[0]], dtype=torch.int32))
        p = teacher.logits(hidden)[-1].double().softmax(-1)[allowed]
        return p / p.sum()

    first = [0 if not text.byte_ids else text.tokens[0] for text in texts if text.tokens or text.ended]
    _assert_drawn(first, expected([]), allowed)
    common = max(set(first) - {0}, key=first.count)
    after = [text for text in texts if text.tokens[:1] == (common,)]
    second = [text.tokens[1] if len(text.tokens) > 1 else 0 for text in after if len(text.tokens) > 1 or text.ended]
    assert len(second) > 100
    _assert_drawn(second, expected([common]), allowed)


def _finished(bits: tuple[bool, ...]) -> int:
    return max((place + 1 for place, bit in enumerate(bits) if bit), default=0)


def _assert_drawn(drawn: list[int], p: Tensor, names: list[int]) -> None:
    counts = torch.tensor([drawn.count(name) for name in names], dtype=torch.float64)
    assert int(counts.sum()) == len(drawn)
    common = p * len(drawn) >= 5
    wanted = torch.cat((p[common], p[~common].sum()[None])) * len(drawn)
    found = torch.cat((counts[common], counts[~common].sum()[None]))
    statistic = float(((found - wanted).square() / wanted.clamp(min=1.0)).sum())
    degrees = int(common.sum())
    assert statistic < degrees + 3.1 * math.sqrt(2 * degrees) + 6, (statistic, degrees)


def test_the_exact_score_is_the_token_nll_less_the_disallowed_mass(teacher: Backbone) -> None:
    row = row_of(TEXT)
    tree = ByteTree.of(TABLE, teacher.columns)
    exact, tokens = score_teacher_bytes(teacher, tree, row), score_tokens(teacher, row)
    assert torch.equal(exact.bytes, tokens.bytes) and exact.ends == tokens.ends == 1
    p = teacher.logits(teacher(teacher.embed(row.tokens), row.cu_chunks)).double().softmax(-1)
    allowed = p[:, [*ALLOWED, 0]].sum(-1).log2()
    mask = text_chunks(row)
    gained = (p[:, 2] + p[:, 6]).log2() - p.gather(1, row.token_labels[:, None])[:, 0].log2()  # two ids spell "ab"
    alike = mask & torch.isin(row.token_labels, torch.tensor([2, 6]))
    expected = tokens.bits.sum() + allowed[mask].sum() - gained[alike].sum()
    assert float(exact.bits.sum()) == pytest.approx(float(expected), rel=1e-6) and alike.any()
    # and it is what the bytes' own targets say
    picked = targets_of(teacher, row).gather(1, row.labels[:, None])[:, 0].double().log2()
    assert float(exact.bits.sum()) == pytest.approx(-float(picked[text_positions(row)].sum()), rel=1e-5)
    last = int(row.loss_mask.sum()) - 1
    assert int(row.labels[last]) == END_OF_DOCUMENT_CLASS
    assert exact.end_bits == pytest.approx(-float(picked[last]), rel=1e-5)
