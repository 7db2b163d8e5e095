from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import fields
from fractions import Fraction
from typing import cast

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megabyte_distill.config.stage import StageConfig
from megabyte_distill.data.dataset import ByteTokenDataset
from megabyte_distill.data.mock import MockDataset, MockRowStream
from megabyte_distill.data.packing import PackedRow
from megabyte_distill.data.sampler import MIN_SHARE, RowPlan, RowStream, Turns, evaluation_plans, evaluation_rows
from megabyte_distill.parallel.process_groups import World
from megabyte_distill.training.rows import MicroBatches

Store = Callable[..., str]


def _stream(*datasets: ByteTokenDataset, weights: list[float] | None = None, seed: int = 1, row: int = 64) -> RowStream:
    return RowStream(datasets, weights, row_bytes=row, chunk_bucket=8, seed=seed)


def _equal(a: PackedRow, b: PackedRow) -> bool:
    pairs = [(getattr(a, f.name), getattr(b, f.name)) for f in fields(a)]
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in pairs)


def test_rows_are_a_function_of_the_seed(dataset: ByteTokenDataset) -> None:
    assert _stream(dataset).next_rows(300) == _stream(dataset).next_rows(300)
    assert _stream(dataset).next_rows(20) != _stream(dataset, seed=2).next_rows(20)


def test_batch_sizes_do_not_matter(dataset: ByteTokenDataset) -> None:
    single, batched = _stream(dataset), _stream(dataset)
    assert [plan for _ in range(50) for plan in batched.next_rows(4)] == single.next_rows(200)


def test_data_parallel_ranks_share_the_single_process_rows(dataset: ByteTokenDataset) -> None:
    single = _stream(dataset)
    ranks = [_stream(dataset) for _ in range(2)]
    for _ in range(20):
        expected = [single.materialize(plan) for plan in single.next_rows(4)]
        shared: list[PackedRow] = []
        for rank, stream in enumerate(ranks):
            shared += [stream.materialize(plan) for plan in stream.next_rows(4)[2 * rank : 2 * rank + 2]]
        assert all(_equal(a, b) for a, b in zip(expected, shared, strict=True))


def test_each_epoch_reads_every_document_once_in_another_order(dataset: ByteTokenDataset) -> None:
    stream = _stream(dataset)
    finished: list[int] = []
    while stream.state_dict()["positions"][0]["epoch"] < 3:
        [plan] = stream.next_rows(1)
        finished += [segment.document for segment in plan.segments if segment.ends_document]
    count = len(dataset)
    epochs = [finished[count * index : count * (index + 1)] for index in range(3)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_consecutive_pieces_of_a_document_join_without_gap(dataset: ByteTokenDataset) -> None:
    open_piece = None
    for plan in _stream(dataset, row=32).next_rows(400):
        for index, segment in enumerate(plan.segments):
            if open_piece is not None:
                assert index == 0 and segment.document == open_piece.document
                assert (segment.token_start, segment.byte_start) == (open_piece.token_end, open_piece.byte_end)
            else:
                assert (segment.token_start, segment.byte_start) == (0, 0)
            open_piece = None if segment.ends_document else segment


@pytest.mark.parametrize("stop", [0, 1, 7, 100, 233])
def test_a_resumed_stream_equals_an_uninterrupted_one(dataset: ByteTokenDataset, store: Store, stop: int) -> None:
    other = ByteTokenDataset(store(["another set " * 30, "", "of works"], "other"))
    weights = [0.3, 0.7]
    whole = _stream(dataset, other, weights=weights).next_rows(400)
    first = _stream(dataset, other, weights=weights)
    assert first.next_rows(stop) == whole[:stop]
    state = json.loads(json.dumps(first.state_dict()))
    first.next_rows(3)
    second = _stream(dataset, other, weights=weights)
    second.load_state_dict(state)
    assert second.rows == stop and second.state_dict() == state
    assert second.next_rows(400 - stop) == whole[stop:]


def test_a_position_of_other_settings_is_refused_with_all_differences(dataset: ByteTokenDataset) -> None:
    state = _stream(dataset).state_dict()
    with pytest.raises(ValueError, match=r"seed: saved 1, now 5; row_bytes: saved 64, now 128"):
        _stream(dataset, seed=5, row=128).load_state_dict(state)
    with pytest.raises(ValueError, match="documents: saved"):
        _stream(dataset.subset(range(5))).load_state_dict(state)


@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.25, 0.75], [1.0, 3.0], [1.0, 1e-6], [10.0, 0.1]])
def test_shares_of_rows_follow_the_weights(store: Store, weights: list[float]) -> None:
    datasets = [ByteTokenDataset(store(["some text " * 20], name)) for name in ("a", "b")]
    rows = 2000
    counts = Counter(plan.dataset for plan in _stream(*datasets, weights=weights).next_rows(rows))
    for index, weight in enumerate(weights):
        assert abs(counts[index] - rows * weight / sum(weights)) <= 1


@pytest.mark.parametrize(
    ("weights", "digest", "credits"),
    [
        ([0.3, 0.7], "a74224ca8a0633f7", [-4.4392267639636884e-13, -8.881784197001252e-13]),
        ([0.2, 0.3, 0.5], "611db9492c807e4f", [1.1102230246251565e-16, -4.4392267639636884e-13, 0.0]),
        ([10.0, 30.0], "f1138883bef01568", [0.0, 0.0]),
        ([1.0, 1e-6], "28b4f41a7f3ee6d8", [-0.0199999799987971, 0.019999980000020692]),
    ],
)
def test_turns_are_those_of_earlier_versions(weights: list[float], digest: str, credits: list[float]) -> None:
    turns = Turns(weights)
    chosen = bytes(turns.next() for _ in range(20_000))
    assert hashlib.sha256(chosen).hexdigest().startswith(digest) and turns.credits.tolist() == credits


_SPREAD = [10.0 ** (-12 * index / 199) for index in range(200)]


@pytest.mark.parametrize(
    "weights",
    [[0.3, 0.7], [1.0, 1e-6], [1e-12, 1.0], [0.3, 0.7, 1e-12], [1.0] * 1000, [1.0, *[1e-6] * 999], _SPREAD],
    ids=["two", "1e-6", "1e-12", "1e-12 of three", "1000 equal", "999 small", "200 from 1 to 1e-12"],
)
def test_a_million_turns_keep_every_share_and_lose_nothing_to_rounding(weights: list[float]) -> None:
    turns, rows = Turns(weights), 1_000_000
    chosen = np.fromiter((turns.next() for _ in range(rows)), dtype=np.int64, count=rows)
    counts = np.bincount(chosen, minlength=len(weights))
    total = sum(map(Fraction, weights))
    for weight, count, credit in zip(weights, counts.tolist(), turns.credits.tolist(), strict=True):
        owed = rows * Fraction(weight) / total - count
        assert abs(owed) <= 1 + 1e-9, "within a row of its share"
        # what rounding has cost: in rows, and of what the data set should have had
        assert abs(owed - Fraction(credit)) < min(1e-9, 1e-4 * rows * weight / float(total))


def test_the_smallest_share_has_its_turn_and_a_lost_one_is_refused() -> None:
    turns = Turns([1.0, 1e-12])
    turns.credits[:] = [-0.5, 0.5 - 1e-6]  # after 5e11 rows less a million and some
    waited = next(number for number in range(1_200_000) if turns.next() == 1)
    assert abs(waited - 500_000) < 100
    turns.credits[:] = [0.9, -0.9]
    for _ in range(1000):
        turns.next()
    assert math.isclose(turns.credits[1] + 0.9, 1e-9, rel_tol=1e-3), "credit grows also where it is large"
    Turns([1.0, 2 * MIN_SHARE])
    with pytest.raises(ValueError, match=r"1e-16 is a share of 1e-16 .*never be read"):
        Turns([1.0, 1e-16])
    assert Turns([1e308, 1e308, 5e307]).shares.tolist() == [0.4, 0.4, 0.2], "their sum is no number, their shares are"


def _pieces(plans: list[RowPlan], dataset: int) -> list[RowPlan]:
    return [plan for plan in plans if plan.dataset == dataset]


def test_weights_changed_at_resume_lose_and_repeat_no_sample(dataset: ByteTokenDataset, store: Store) -> None:
    other = ByteTokenDataset(store(["another set " * 30, "", "of works"] * 9, "other"))
    third = ByteTokenDataset(store(["third " * 50, "one"], "third"))
    sets = (dataset, other, third)
    reference = [
        _pieces(_stream(*sets, weights=[1.0 + 9 * (i == index) for i in range(3)]).next_rows(900), index)
        for index in range(3)
    ]
    plans: list[RowPlan] = []
    state = None
    for weights, rows in (
        ([0.6, 0.3, 0.1], 101),
        ([0.1, 0.2, 0.7], 203),
        ([1.0, 1e-6, 1e-6], 57),
        ([1.0, 5.0, 1.0], 90),
    ):
        stream = _stream(*sets, weights=weights)
        if state is not None:
            stream.load_state_dict(state)
        plans += stream.next_rows(rows)
        state = json.loads(json.dumps(stream.state_dict()))
    for index, expected in enumerate(reference):
        seen = _pieces(plans, index)
        assert len(seen) > 10 and seen == expected[: len(seen)], (
            "each set's rows, in its own order, none twice or left out"
        )


@pytest.mark.parametrize(("ranks", "micro_batch_size"), [(1, 1), (1, 4), (2, 1), (2, 6), (3, 2), (4, 3)])
def test_an_updates_rows_do_not_depend_on_ranks_and_micro_batches(
    dataset: ByteTokenDataset, store: Store, ranks: int, micro_batch_size: int
) -> None:
    other = ByteTokenDataset(store(["another set " * 30, "", "of works"], "other"))
    plain = _stream(dataset, other)
    config = StageConfig(seq_length=64, chunk_bucket=8, global_batch_size=12, micro_batch_size=micro_batch_size)
    group = cast(dist.ProcessGroup, None)
    worlds = [World(rank, ranks, rank, ranks, group, torch.device("cpu")) for rank in range(ranks)]
    parts = [MicroBatches(_stream(dataset, other), config, world) for world in worlds]
    for _ in range(5):
        expected = [plain.materialize(plan) for plan in plain.next_rows(12)]
        for rank, part in enumerate(parts):
            found = torch.cat([micro.byte_ids for micro in part.next_micro_batches(0)])
            assert torch.equal(found, torch.cat([row.byte_ids for row in expected[rank::ranks]]))


def test_weights_may_change_at_resume(store: Store) -> None:
    datasets = [ByteTokenDataset(store(["some text " * 20], name)) for name in ("a", "b")]
    before = _stream(*datasets, weights=[1.0, 9.0])
    before.next_rows(501)
    after = _stream(*datasets, weights=[9.0, 1.0])
    after.load_state_dict(before.state_dict())
    counts = Counter(plan.dataset for plan in after.next_rows(1000))
    assert abs(counts[0] - 900) <= 2


def test_evaluation_keeps_the_stored_order(dataset: ByteTokenDataset) -> None:
    part = dataset.subset(range(10, 60))
    finished = [s.document for plan in evaluation_plans(part, row_bytes=64) for s in plan.segments if s.ends_document]
    assert finished == list(range(10, 60))


def test_only_the_subset_is_read(dataset: ByteTokenDataset) -> None:
    stream = _stream(dataset.subset(range(3, 9)))
    seen = {segment.document for plan in stream.next_rows(60) for segment in plan.segments}
    assert seen == set(range(3, 9))


def test_planning_reads_no_bytes(dataset: ByteTokenDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ByteTokenDataset, "byte_ids", None)
    _stream(dataset).next_rows(50)


def test_little_room_is_padded(store: Store) -> None:
    dataset = ByteTokenDataset(store(["x" * 40, "x" * 40]))
    for min_room, expected in ((16, 2), (24, 2), (1, 2)):
        plans = list(evaluation_plans(dataset, row_bytes=64, min_room=min_room))
        assert len(plans) == expected and len(plans[0].segments) == (1 if min_room == 24 else 2)


def test_empty_documents_are_rows_too(store: Store) -> None:
    dataset = ByteTokenDataset(store([""] * 100))
    rows = list(evaluation_rows(dataset, row_bytes=32, chunk_bucket=4))
    assert sum(int(row.is_real.sum()) for row in rows) == 100
    assert sum(int(row.token_ends_document.sum()) for row in rows) == 100


def test_a_token_longer_than_a_row_names_its_document(store: Store) -> None:
    dataset = ByteTokenDataset(store(["ok", "The house stood"]))
    longest = int(dataset.table.lengths[dataset[1].tokens].max())
    assert longest > 2
    list(evaluation_plans(dataset, row_bytes=longest + 1))
    with pytest.raises(ValueError, match=r"document 1, token \d+ alone is longer than a row of"):
        list(evaluation_plans(dataset, row_bytes=longest))


def test_bad_blends_are_refused(dataset: ByteTokenDataset, store: Store, metaspace_folder: str) -> None:
    for weights in ([0.0], [-1.0], [float("nan")], [1.0, 2.0]):
        with pytest.raises(ValueError, match="weight"):
            _stream(dataset, weights=weights)
    with pytest.raises(ValueError, match="no documents"):
        _stream(dataset.subset(range(0)))
    with pytest.raises(ValueError, match="at least 2 and 1"):
        _stream(dataset, row=1)
    other = ByteTokenDataset(store(["the a"], "other", metaspace_folder))
    with pytest.raises(ValueError, match="needs one tokenizer"):
        _stream(dataset, other)


def test_mock_rows_need_only_a_vocabulary() -> None:
    stream, again = (MockRowStream(300, row_bytes=256, chunk_bucket=16, seed=3) for _ in range(2))
    for plan, same in zip(stream.next_rows(20), again.next_rows(20), strict=True):
        row = stream.materialize(plan)
        assert plan == same and isinstance(plan, RowPlan)
        assert row.tokens.max() < 300 and row.tokens.shape[0] % 16 == 0


def test_mock_words_are_distinct() -> None:
    table = MockDataset(2000, seed=0).table
    words = [table[index] for index in range(1, 2000)]
    assert len(set(words)) == 1999 and all(words) and np.array_equal(table.special.nonzero()[0], [0])
