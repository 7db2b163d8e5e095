"""The whole student on packed rows: packing, padding, boundaries, what runs, document masks, low precision."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from megabyte_distill.alphabet import BOS_BYTE
from megabyte_distill.config.model import ByteMixer, ChunkPooling, DechunkMode
from megabyte_distill.data.micro_batch import concatenate_rows
from megabyte_distill.data.packing import PackedRow, without_document_mask
from megabyte_distill.model.student import (
    Boundaries,
    Given,
    Gold,
    Parts,
    RouterDecides,
    Student,
    StudentOutputs,
    set_trainable,
)
from tests.tiny_student import (
    assert_same,
    gradients,
    padded_row,
    random_rows,
    segments_alone,
    tiny_student,
    with_other_padding,
)

pytestmark = pytest.mark.usefixtures("world")

MIXERS = list(ByteMixer)
MODES = list(DechunkMode)


def fixed_function(outputs: StudentOutputs, row: PackedRow) -> Tensor:
    """A scalar that depends unevenly on every real logit, state and probability."""
    assert outputs.logits is not None and outputs.p is not None
    assert outputs.hidden is not None and outputs.layout is not None
    real_chunks = row.is_real[outputs.layout.ends[: outputs.layout.num_chunks]]
    hidden = outputs.hidden[: outputs.layout.num_chunks][real_chunks]
    total = torch.zeros((), dtype=outputs.logits.dtype)
    for values in (outputs.logits[row.is_real], hidden, outputs.p[row.is_real][:, None]):
        total = total + (values * torch.linspace(-1, 1, values.shape[1] + 1, dtype=values.dtype)[1:]).tanh().sum()
    return total


def row_gradients(student: Student, rows: list[PackedRow], boundaries: Boundaries) -> dict[str, Tensor]:
    return gradients(student, lambda: torch.stack([fixed_function(student(r, boundaries), r) for r in rows]).sum())


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("boundaries", [Gold(), RouterDecides()], ids=["gold", "router"])
def test_a_packed_row_equals_its_documents_alone(mixer: ByteMixer, mode: DechunkMode, boundaries: Boundaries) -> None:
    student = tiny_student(mixer, mode).double()
    row = padded_row()
    alone = segments_alone(row)
    with torch.no_grad():
        packed = student(row, boundaries)
        single = [student(document, boundaries) for document in alone]
    for name in ("r", "p", "logits", "bits"):
        expected = torch.cat([getattr(outputs, name) for outputs in single])
        torch.testing.assert_close(getattr(packed, name)[: expected.shape[0]], expected, rtol=1e-9, atol=1e-9)
    hidden = torch.cat([outputs.hidden[: outputs.layout.num_chunks] for outputs in single])
    torch.testing.assert_close(packed.hidden[: hidden.shape[0]], hidden, rtol=1e-9, atol=1e-9)
    assert packed.layout.num_chunks == hidden.shape[0] + 1
    together, apart = row_gradients(student, [row], boundaries), row_gradients(student, alone, boundaries)
    assert_same(together, apart, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("pooling", [ChunkPooling.MEAN_LAST, ChunkPooling.MAX])
@pytest.mark.parametrize("mode", [DechunkMode.HARD, DechunkMode.OFFICIAL])
@pytest.mark.parametrize("boundaries", [Gold(), RouterDecides()], ids=["gold", "router"])
def test_pooling_stays_inside_documents_and_text(
    pooling: ChunkPooling, mode: DechunkMode, boundaries: Boundaries
) -> None:
    student = tiny_student(mode=mode, pooling=pooling).double()
    row = padded_row()
    used, alone = int(row.is_real.sum()), segments_alone(row)
    with torch.no_grad():
        packed = student(row, boundaries).logits[:used]
        single = torch.cat([student(document, boundaries).logits for document in alone])
        padded = student(replace(with_other_padding(row), chunk_bucket=50), boundaries).logits[:used]
        last = tiny_student(mode=mode).double()
        last.load_state_dict(student.state_dict())
        other = last(row, boundaries).logits[:used]
    torch.testing.assert_close(packed, single, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(packed, padded, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(packed, other)
    together, apart = row_gradients(student, [row], boundaries), row_gradients(student, alone, boundaries)
    assert_same(together, apart, rtol=1e-8, atol=1e-10)


def test_ngrams_stay_inside_documents_and_learn() -> None:
    student, row = tiny_student(ngrams=(3, 8)).double(), padded_row()
    used, alone = int(row.is_real.sum()), segments_alone(row)
    with torch.no_grad():
        packed = student(row).logits[:used]
        single = torch.cat([student(document).logits for document in alone])
    torch.testing.assert_close(packed, single, rtol=1e-9, atol=1e-9)
    together, apart = row_gradients(student, [row], Gold()), row_gradients(student, alone, Gold())
    assert_same(together, apart, rtol=1e-8, atol=1e-10)
    assert together["byte_encoder.ngram_table"].any(dim=1).sum() > 30


def test_new_ngram_tables_change_nothing_at_first() -> None:
    row = padded_row()
    plain, with_tables = tiny_student(), tiny_student(ngrams=(3, 4))
    assert with_tables.byte_encoder.ngram_table is not None
    nn.init.zeros_(with_tables.byte_encoder.ngram_table)
    with_tables.load_state_dict(plain.state_dict(), strict=False)
    with torch.no_grad():
        assert torch.equal(with_tables(row).logits, plain(row).logits)


@pytest.mark.parametrize("pooling", list(ChunkPooling))
def test_the_encoder_alone_pools_as_the_whole_student_does(pooling: ChunkPooling) -> None:
    student, row = tiny_student(pooling=pooling).double(), padded_row()
    with torch.no_grad():
        alone, whole = student(row, parts=Parts.ENCODER), student(row)
    torch.testing.assert_close(alone.chunks, whole.chunks, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("document_mask", [True, False])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("boundaries", [Gold(), RouterDecides()], ids=["gold", "router"])
def test_a_micro_batch_equals_its_rows_one_by_one(
    document_mask: bool, mode: DechunkMode, boundaries: Boundaries
) -> None:
    student = tiny_student(mode=mode).double()
    rows = random_rows(3) if document_mask else [without_document_mask(row) for row in random_rows(3)]
    batch = concatenate_rows(rows)
    with torch.no_grad():
        expected = torch.cat([student(row, boundaries).logits for row in rows])
        torch.testing.assert_close(student(batch, boundaries).logits, expected, rtol=1e-9, atol=1e-9)
    together, apart = row_gradients(student, [batch], boundaries), row_gradients(student, rows, boundaries)
    assert_same(together, apart, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("document_mask", [True, False])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("boundaries", [Gold(), RouterDecides()], ids=["gold", "router"])
def test_padding_influences_nothing(document_mask: bool, mode: DechunkMode, boundaries: Boundaries) -> None:
    student = tiny_student(mode=mode).double()
    row = padded_row() if document_mask else without_document_mask(padded_row())
    used = int(row.is_real.sum())
    for other in (with_other_padding(row), replace(row, chunk_bucket=50)):
        with torch.no_grad():
            before, after = student(row, boundaries), student(other, boundaries)
        torch.testing.assert_close(after.logits[:used], before.logits[:used])
        torch.testing.assert_close(after.p[:used], before.p[:used])
        assert_same(row_gradients(student, [other], boundaries), row_gradients(student, [row], boundaries))


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("mode", MODES)
def test_no_logit_up_to_t_moves_with_the_next_byte_when_bits_are_fixed(mixer: ByteMixer, mode: DechunkMode) -> None:
    student = tiny_student(mixer, mode)
    row = random_rows(1, row_bytes=40, max_tokens=60, seed=3)[0]
    used = int(row.is_real.sum())
    leaks = 0
    with torch.no_grad():
        logits = student(row, Given(row.bits)).logits
        for t in range(used - 1):
            if row.byte_ids[t + 1] == BOS_BYTE:
                continue
            byte_ids = row.byte_ids.clone()
            byte_ids[t + 1] = (byte_ids[t + 1] + 1) % 250
            moved = student(replace(row, byte_ids=byte_ids), Given(row.bits)).logits
            leaks += not torch.equal(moved[: t + 1], logits[: t + 1])
            assert not torch.equal(moved[t + 1], logits[t + 1])
    if mode is DechunkMode.OFFICIAL:
        assert leaks > 10
    else:
        assert leaks == 0


@pytest.mark.parametrize("mode", MODES)
def test_the_routers_boundaries_hold_bos_segment_ends_and_one_chunk_of_pad(mode: DechunkMode) -> None:
    student, row = tiny_student(mode=mode), padded_row()
    used = int(row.is_real.sum())
    with torch.no_grad():
        # with a threshold of 1 the router alone ends nothing
        reluctant, eager = student(row, RouterDecides(1.0)), student(row, RouterDecides(-1.0))
        plain = student(row, RouterDecides())
    starts = row.cu_seqlens[:-2].long()
    expected = torch.zeros_like(row.bits)
    expected[used] = True
    if mode is not DechunkMode.OFFICIAL:
        expected[starts] = True
    assert torch.equal(reluctant.bits, expected)
    assert eager.bits[: used + 1].all() and not eager.bits[used + 1 :].any()
    thresholded = plain.p > 0.5
    if mode is not DechunkMode.OFFICIAL:
        thresholded[starts] = True
    assert torch.equal(plain.bits[:used], thresholded[:used]) and plain.bits[row.cu_seqlens[1:-1].long() - 1].all()


def test_parts_that_do_not_run_give_none_and_get_no_gradient() -> None:
    row = padded_row()
    student = tiny_student(mode=DechunkMode.HARD)
    cases = {
        Parts.ENCODER: ({"chunks", "bits", "layout"}, {"byte_encoder"}),
        Parts.ENCODER | Parts.ROUTER: ({"r", "p"}, {"byte_encoder", "router"}),
        Parts.ENCODER | Parts.BACKBONE: ({"chunks", "bits", "layout", "hidden"}, {"byte_encoder", "backbone"}),
        Parts.ENCODER | Parts.BACKBONE | Parts.DECODER: (
            {"r", "chunks", "bits", "layout", "hidden", "logits"},
            {"byte_encoder", "backbone", "byte_decoder"},
        ),
        Parts.ALL: (
            {"r", "chunks", "p", "bits", "layout", "hidden", "logits"},
            {"byte_encoder", "router", "backbone", "byte_decoder"},
        ),
    }
    names = ("r", "chunks", "p", "bits", "layout", "hidden", "logits")
    for parts, (given, trained) in cases.items():
        outputs = student(row, parts=parts)
        assert {name for name in names if getattr(outputs, name) is not None} == given

        def loss(outputs: StudentOutputs = outputs) -> Tensor:
            found = [getattr(outputs, name) for name in ("r", "chunks", "p", "hidden", "logits")]
            return torch.stack([value.square().sum() for value in found if value is not None]).sum()

        assert {name.split(".")[0] for name in gradients(student, loss)} == trained


@pytest.mark.parametrize("mode", [DechunkMode.CAUSAL, DechunkMode.OFFICIAL])
def test_modes_that_read_p_run_the_router_whether_asked_or_not(mode: DechunkMode) -> None:
    student, row = tiny_student(mode=mode), padded_row()
    with torch.no_grad():
        asked = student(row).logits
        assert torch.equal(student(row, parts=Parts.ENCODER | Parts.BACKBONE | Parts.DECODER).logits, asked)


def test_the_encoders_head_at_chunk_ends_alone_says_the_same() -> None:
    student, row = tiny_student(), padded_row()
    with torch.no_grad():
        few, all_bytes = student(row, parts=Parts.ENCODER), student(row)
    torch.testing.assert_close(few.chunks, all_bytes.chunks)
    assert not few.chunks[few.layout.num_chunks :].any()


def test_hard_logits_do_not_depend_on_the_router() -> None:
    student, row = tiny_student(), padded_row()
    with torch.no_grad():
        with_router = student(row).logits
        assert torch.equal(student(row, parts=Parts.ENCODER | Parts.BACKBONE | Parts.DECODER).logits, with_router)


def test_boundaries_default_to_gold_and_may_be_given() -> None:
    student, row = tiny_student(), padded_row()
    other = replace(row, bits=row.bits.roll(1) | (row.byte_ids == BOS_BYTE) | row.bits)
    with torch.no_grad():
        assert torch.equal(student(row).logits, student(row, Gold()).logits)
        given = student(row, Given(other.bits))
        assert torch.equal(given.logits, student(other).logits) and torch.equal(given.bits, other.bits)
        assert not torch.equal(given.logits, student(row).logits)


def test_given_bits_that_do_not_end_a_chunk_at_bos_are_refused() -> None:
    student, row = tiny_student(), padded_row()
    with pytest.raises(ValueError, match="given bits: byte 0 begins a segment"):
        student(row, Given(row.bits & (row.byte_ids != BOS_BYTE)))


def test_a_part_that_is_frozen_needs_no_gradient() -> None:
    student = tiny_student()
    set_trainable(student, ("byte_decoder.",))
    outputs = student(padded_row())
    assert outputs.logits is not None and outputs.logits.requires_grad
    for value in (outputs.r, outputs.p, outputs.hidden):
        assert value is not None and not value.requires_grad


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("mode", MODES)
def test_without_document_mask_documents_of_a_row_see_each_other(mixer: ByteMixer, mode: DechunkMode) -> None:
    student, row = tiny_student(mixer, mode), padded_row()
    used, first = int(row.is_real.sum()), int(row.cu_seqlens[1])
    with torch.no_grad():
        merged, apart = student(without_document_mask(row)), student(row)
    assert (merged.p[row.cu_seqlens[1:-2].long() - 1] < 1).all() and merged.p[used - 1] == 1
    assert not torch.allclose(merged.logits[first:used], apart.logits[first:used])
    if mode is not DechunkMode.OFFICIAL:
        torch.testing.assert_close(merged.logits[:first], apart.logits[:first])


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("mode", MODES)
def test_bf16_stays_near_the_same_weights_in_fp32(mixer: ByteMixer, mode: DechunkMode) -> None:
    low = tiny_student(mixer, mode).bfloat16()
    high = tiny_student(mixer, mode)
    high.load_state_dict(low.state_dict())
    row = padded_row()
    with torch.no_grad():
        got, expected = low(row), high(row)
    assert got.logits.dtype is torch.bfloat16 and got.p.dtype is torch.float32
    # roundings of 2^-9 at about 50 places on the longest path (4 mixers, 2 layers of 8 each, heads) add up as a random
    # walk: 50^½ · 2^-9 ≈ 1.4 %; attention and the gates may double it
    used = row.is_real
    error = (got.logits.float() - expected.logits)[used].square().mean().sqrt()
    assert float(error) < 0.03 * float(expected.logits[used].std())
    assert float((got.p - expected.p)[used].abs().max()) < 0.05
