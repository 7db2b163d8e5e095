"""Reading byte by byte equals one pass over the whole, given the same bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megabyte_distill.alphabet import BOS_BYTE
from megabyte_distill.config.model import ByteMixer, ChunkPooling, DechunkMode
from megabyte_distill.data.packing import PackedRow
from megabyte_distill.model.student import Given, Student, StudentState
from tests.tiny_student import random_rows, segments_alone, tiny_student

pytestmark = pytest.mark.usefixtures("world")

MIXERS = list(ByteMixer)
STEPPED_MODES = [DechunkMode.HARD, DechunkMode.CAUSAL]


def documents() -> list[PackedRow]:
    """Six segments of different lengths, one byte and more than the cache's first 32 chunks among them."""
    segments = [segment for row in random_rows(30, row_bytes=130, max_tokens=90) for segment in segments_alone(row)]
    segments.sort(key=lambda segment: int(segment.bits.sum()))
    chosen = [segments[0], *segments[len(segments) // 4 :: len(segments) // 5], segments[-1]][:6]
    assert chosen[0].byte_ids.shape[0] == 1 and int(chosen[-1].bits.sum()) > 40
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    return [chosen[index] for index in order.tolist()]


def any_bits(document: PackedRow) -> Tensor:
    """Boundaries that no tokenizer would draw; BOS and the last byte are ends, as everywhere."""
    bits = torch.rand(document.byte_ids.shape[0]) < 0.5
    bits[-1] = True
    return bits | (document.byte_ids == BOS_BYTE)


def read(student: Student, byte_ids: list[Tensor], bits: list[Tensor]) -> list[Tensor]:
    """Logits of all documents, read side by side; each falls out of the batch at its own end."""
    state = student.init_state(len(byte_ids))
    logits: list[list[Tensor]] = [[] for _ in byte_ids]
    for t in range(max(document.shape[0] for document in byte_ids)):
        rows = torch.tensor([i for i, document in enumerate(byte_ids) if document.shape[0] > t])
        now = torch.stack([byte_ids[i][t] for i in rows.tolist()])
        ended = torch.stack([bits[i][t] for i in rows.tolist()])
        step = student.step(now, ended, state, rows)
        for place, row in enumerate(rows.tolist()):
            logits[row].append(step[place])
    return [torch.stack(row) for row in logits]


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("mode", STEPPED_MODES)
@pytest.mark.parametrize("gold", [True, False])
def test_steps_of_a_ragged_batch_equal_forward(mixer: ByteMixer, mode: DechunkMode, gold: bool) -> None:
    student, texts = tiny_student(mixer, mode), documents()
    bits = [document.bits if gold else any_bits(document) for document in texts]
    stepped = read(student, [document.byte_ids for document in texts], bits)
    for got, document, own in zip(stepped, texts, bits, strict=True):
        with torch.no_grad():
            expected = student(document, Given(own)).logits
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pooling", [ChunkPooling.MEAN_LAST, ChunkPooling.MAX])
@pytest.mark.parametrize("mode", STEPPED_MODES)
def test_steps_of_a_ragged_batch_pool_as_forward_does(pooling: ChunkPooling, mode: DechunkMode) -> None:
    student, texts = tiny_student(mode=mode, pooling=pooling), documents()
    bits = [any_bits(document) for document in texts]
    stepped = read(student, [document.byte_ids for document in texts], bits)
    for got, document, own in zip(stepped, texts, bits, strict=True):
        with torch.no_grad():
            expected = student(document, Given(own)).logits
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("ngrams", [(3, 4, 5, 6, 7, 8), (2,)])
def test_steps_of_a_ragged_batch_hash_the_ngrams_that_forward_does(ngrams: tuple[int, ...]) -> None:
    student, texts = tiny_student(ngrams=ngrams), documents()
    stepped = read(student, [document.byte_ids for document in texts], [document.bits for document in texts])
    for got, document in zip(stepped, texts, strict=True):
        with torch.no_grad():
            expected = student(document).logits
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def read_in_spans(student: Student, byte_ids: list[Tensor], bits: list[Tensor], longest: int) -> list[Tensor]:
    """As :func:`read`, several bytes of each document at once, of which a random number is kept."""
    state, done = student.init_state(len(byte_ids)), [0] * len(byte_ids)
    logits: list[list[Tensor]] = [[] for _ in byte_ids]
    while open_rows := [i for i, document in enumerate(byte_ids) if done[i] < document.shape[0]]:
        length = int(torch.randint(1, longest + 1, ()))
        wrong = torch.randint(256, (len(open_rows), length))
        ends, counts = torch.zeros(len(open_rows), length, dtype=torch.bool), []
        for place, row in enumerate(open_rows):
            real = min(length, byte_ids[row].shape[0] - done[row])
            counts.append(int(torch.randint(0, real + 1, ())))
            wrong[place, : counts[-1]] = byte_ids[row][done[row] :][: counts[-1]]
            ends[place, : counts[-1]] = bits[row][done[row] :][: counts[-1]]
            ends[place, counts[-1] :] = torch.rand(length - counts[-1]) < 0.5  # taken back with their bytes
        found, span = student.steps(wrong, ends, state, torch.tensor(open_rows))
        span.keep(torch.tensor(counts))
        for place, (row, count) in enumerate(zip(open_rows, counts, strict=True)):
            logits[row].append(found[place, :count])
            done[row] += count
    return [torch.cat(row) for row in logits]


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("mode", STEPPED_MODES)
@pytest.mark.parametrize("pooling", list(ChunkPooling))
def test_spans_of_which_some_bytes_are_taken_back_equal_forward(
    mixer: ByteMixer, mode: DechunkMode, pooling: ChunkPooling
) -> None:
    student, texts = tiny_student(mixer, mode, pooling=pooling, ngrams=(2, 4)), documents()
    bits = [any_bits(document) for document in texts]
    stepped = read_in_spans(student, [document.byte_ids for document in texts], bits, 24)
    for got, document, own in zip(stepped, texts, bits, strict=True):
        with torch.no_grad():
            expected = student(document, Given(own)).logits
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("mode", STEPPED_MODES)
def test_steps_equal_the_packed_row_of_the_same_documents(mixer: ByteMixer, mode: DechunkMode) -> None:
    student, row = tiny_student(mixer, mode), random_rows(1, row_bytes=100)[0]
    texts = segments_alone(row)
    stepped = torch.cat(read(student, [text.byte_ids for text in texts], [text.bits for text in texts]))
    with torch.no_grad():
        expected = student(row).logits[row.is_real]
    assert len(texts) > 1
    torch.testing.assert_close(stepped, expected, rtol=1e-4, atol=1e-4)


def advance(student: Student, state: StudentState, byte_ids: list[int], bit: bool = False) -> Tensor:
    return student.step(torch.tensor(byte_ids), torch.full((len(byte_ids),), bit), state)


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("mode", STEPPED_MODES)
@pytest.mark.parametrize("pooling", list(ChunkPooling))
def test_selected_rows_go_their_own_way(mixer: ByteMixer, mode: DechunkMode, pooling: ChunkPooling) -> None:
    student = tiny_student(mixer, mode, pooling=pooling)
    state = student.init_state(2)
    advance(student, state, [BOS_BYTE, BOS_BYTE], True)
    advance(student, state, [7, 8], True)
    twice = state.select(torch.tensor([1, 1, 0]))
    untouched = advance(student, state.select(torch.tensor([0, 1])), [9, 9])
    forked = advance(student, twice, [9, 10, 9])
    torch.testing.assert_close(forked[[2, 0]], untouched)
    assert not torch.allclose(forked[0], forked[1])
    advance(student, twice, [1, 2, 3], True)
    torch.testing.assert_close(advance(student, state, [9, 9]), untouched)


@pytest.mark.parametrize("pooling", list(ChunkPooling))
def test_rows_that_are_not_named_stay_where_they_are(pooling: ChunkPooling) -> None:
    student = tiny_student(ByteMixer.MAMBA2, DechunkMode.CAUSAL, pooling=pooling)
    state, alone = student.init_state(3), student.init_state(1)
    advance(student, state, [BOS_BYTE] * 3, True)
    advance(student, alone, [BOS_BYTE], True)
    for byte in (5, 6, 7):
        student.step(torch.tensor([byte, byte]), torch.tensor([True, False]), state, torch.tensor([2, 0]))
    got = student.step(torch.tensor([9]), torch.tensor([True]), state, torch.tensor([1]))
    torch.testing.assert_close(got, advance(student, alone, [9], True))
    assert state.cache.lengths.tolist() == [1, 2, 4]


def test_official_mode_refuses_to_step() -> None:
    student = tiny_student(mode=DechunkMode.OFFICIAL)
    with pytest.raises(ValueError, match="use hard or causal"):
        advance(student, student.init_state(1), [BOS_BYTE], True)


@pytest.mark.parametrize("mode", STEPPED_MODES)
def test_bf16_steps_stay_near_the_bf16_forward(mode: DechunkMode) -> None:
    student, texts = tiny_student(ByteMixer.MAMBA2, mode).bfloat16(), documents()
    stepped = read(student, [text.byte_ids for text in texts], [text.bits for text in texts])
    for got, document in zip(stepped, texts, strict=True):
        with torch.no_grad():
            expected = student(document, Given(document.bits)).logits
        # two orders of summation, each rounded to 2^-9 some fifty times: the bound of test_student's bf16 test, twice
        error = (got - expected).float().square().mean().sqrt()
        assert got.dtype is torch.bfloat16 and float(error) < 0.06 * float(expected.float().std())
