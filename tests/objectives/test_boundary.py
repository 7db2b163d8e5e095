"""The router's loss and F1, on cases small enough to count by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from megabyte_distill.alphabet import BOS_BYTE, PAD_BYTE
from megabyte_distill.data.packing import PackedRow
from megabyte_distill.objectives.boundary import (
    boundary_bce,
    boundary_counts,
    boundary_positions,
    chunk_lengths,
    f1_pair,
)


def row_of(text: list[int], bits: list[int], cu_seqlens: list[int]) -> PackedRow:
    byte_ids = torch.tensor(text)
    empty = torch.zeros(0, dtype=torch.int64)
    return PackedRow(
        byte_ids=byte_ids,
        bits=torch.tensor(bits, dtype=torch.bool),
        labels=torch.zeros_like(byte_ids),
        is_real=byte_ids != PAD_BYTE,
        tokens=empty,
        token_labels=empty,
        token_mask=empty.bool(),
        token_ends_document=empty.bool(),
        cu_seqlens=torch.tensor(cu_seqlens, dtype=torch.int32),
        cu_chunks=torch.tensor([0], dtype=torch.int32),
        chunk_bucket=1,
        documents=(0, 1),
    )


ROW = row_of(
    [BOS_BYTE, 97, 98, 99, 100, BOS_BYTE, 97, 98, PAD_BYTE, PAD_BYTE],
    [1, 0, 1, 0, 1, 1, 1, 1, 1, 0],
    [0, 5, 8, 10],
)


def test_bce_is_the_log_of_the_right_sides_probability() -> None:
    p, bits = torch.tensor([0.9, 0.9, 0.25, 0.25]), torch.tensor([True, False, True, False])
    expected = [-math.log(0.9), -math.log(0.1), -math.log(0.25), -math.log(0.75)]
    torch.testing.assert_close(boundary_bce(p, bits), torch.tensor(expected))


def test_bce_of_nan_is_nan_and_of_the_others_as_ever() -> None:
    p, bits = torch.tensor([0.9, math.nan, 0.25]), torch.tensor([True, True, False])
    loss = boundary_bce(p, bits)
    assert loss.isnan().tolist() == [False, True, False]
    assert torch.equal(loss[[0, 2]], boundary_bce(p[[0, 2]], bits[[0, 2]]))


def test_certain_mistakes_are_dear_but_finite_in_value_and_gradient() -> None:
    p = torch.tensor([0.0, 1.0, 0.0, 1.0], requires_grad=True)
    loss = boundary_bce(p, torch.tensor([True, False, False, True]))
    loss.sum().backward()
    # torch's own guard stands at 100 nats and a slope of 1e12, which one byte would spend a whole update's clipping on
    assert ((loss[:2] > 13) & (loss[:2] < 17)).all() and (loss[2:] < 1e-5).all()
    assert p.grad is not None and bool((p.grad.abs() <= 2e6).all())


def test_bce_is_computed_in_fp32() -> None:
    assert boundary_bce(torch.tensor([0.5]).bfloat16(), torch.tensor([True])).dtype is torch.float32


def test_the_router_trains_on_all_bytes_but_a_segments_last_and_pad() -> None:
    assert boundary_positions(ROW).nonzero()[:, 0].tolist() == [0, 1, 2, 3, 5, 6]


def test_one_segment_more_or_less_moves_the_positions() -> None:
    merged = replace(ROW, cu_seqlens=torch.tensor([0, 8, 10], dtype=torch.int32))
    assert boundary_positions(merged).nonzero()[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 6]


def test_f1_counts_only_predictions() -> None:
    # bytes that count: 1, 2, 3 of the first document and 6 of the second; gold ends there: 2 and 6
    guess = torch.tensor([0, 1, 1, 0, 0, 0, 0, 0, 0, 0], dtype=torch.bool)
    counts = {name: int(value) for name, value in boundary_counts(guess, ROW).items()}
    assert counts == {"hits": 1, "predicted": 2, "gold": 2}
    total, count = f1_pair(guess, ROW)
    assert (float(total), int(count)) == (2.0, 4)


def test_f1_is_one_for_gold_bits_and_zero_for_their_opposite() -> None:
    total, count = f1_pair(ROW.bits, ROW)
    assert float(total) == float(count) == 4
    total, count = f1_pair(~ROW.bits, ROW)
    assert float(total) == 0 and int(count) == 4


def test_bos_and_last_bytes_and_pad_are_no_predictions() -> None:
    everywhere = torch.ones(10, dtype=torch.bool)
    assert int(boundary_counts(everywhere, ROW)["predicted"]) == 4
    forced = everywhere.clone()
    forced[[1, 2, 3, 6]] = False
    assert int(boundary_counts(forced, ROW)["predicted"]) == 0


def test_bytes_per_chunk_are_counted_where_ends_are_predicted_or_merged() -> None:
    assert chunk_lengths(ROW) == {}, "the teacher's tokens, the same in every update"
    predicted = torch.tensor([1, 0, 0, 0, 1, 1, 0, 1, 1, 1], dtype=torch.bool)
    found = {name: (int(size), int(count)) for name, (size, count) in chunk_lengths(ROW, predicted).items()}
    assert found == {"bytes per chunk": (6, 4), "router bytes per chunk": (6, 2)}
    merged = replace(ROW, token_bits=ROW.bits)
    assert list(chunk_lengths(merged)) == ["bytes per chunk"]
