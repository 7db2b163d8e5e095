"""Micro-batches whose chunks grow: the same for any ranks, and from any update on."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import cast

import torch
import torch.distributed as dist

from megabyte_distill.config.stage import StageConfig
from megabyte_distill.data.chunk_merging import ChunkSchedule, ChunkSizes, bytes_and_chunks, merge_row, sample_rows
from megabyte_distill.data.mock import MockRowStream
from megabyte_distill.data.packing import PackedRow
from megabyte_distill.parallel.process_groups import World
from megabyte_distill.training.rows import CHUNK_LIMIT, HeldOutRows, MicroBatches

CONFIG = StageConfig(
    seq_length=128,
    chunk_bucket=8,
    global_batch_size=4,
    micro_batch_size=2,
    eval_iters=1,
    target_bytes_per_chunk=8.0,
    target_bytes_per_chunk_iters=4,
)
GROUP = cast(dist.ProcessGroup, None)
ALONE = World(0, 1, 0, 1, GROUP, torch.device("cpu"))


def stream(seed: int = 2) -> MockRowStream:
    return MockRowStream(500, row_bytes=128, chunk_bucket=8, seed=seed)


@cache
def sizes() -> ChunkSizes:
    return ChunkSizes(sample_rows(stream(seed=0)))


def source(world: World = ALONE, micro_batch_size: int = 2) -> MicroBatches:
    rows = stream()
    config = replace(CONFIG, micro_batch_size=micro_batch_size)
    return MicroBatches(rows, config, world, chunk_sizes=ChunkSchedule(config, sizes()))


def mean(rows: list[PackedRow]) -> float:
    counts = [bytes_and_chunks(row, row.bits) for row in rows]
    return float(sum(size for size, _ in counts) / sum(chunks for _, chunks in counts))


def test_chunks_grow_and_stay_long() -> None:
    rows = source()
    lengths = [mean(rows.next_micro_batches(update)) for update in range(12)]
    assert lengths[0] < 2.5 < lengths[2] < 7.0 < sum(lengths[4:]) / 8 < 9.0
    assert rows.next_micro_batches(0)[0].token_bits is None and rows.next_micro_batches(1)[0].token_bits is not None


def test_ranks_and_micro_batches_see_the_same_bits() -> None:
    ranks = [World(rank, 2, rank, 2, GROUP, torch.device("cpu")) for rank in range(2)]
    whole, parts = source(), [source(world, micro_batch_size=1) for world in ranks]
    for update in range(5):
        expected = torch.cat([row.bits for row in whole.next_micro_batches(update)]).view(4, -1)
        for rank, part in enumerate(parts):
            found = torch.cat([row.bits for row in part.next_micro_batches(update)]).view(2, -1)
            assert torch.equal(found, expected[rank::2])


def test_a_resumed_source_goes_on_with_the_same_rows() -> None:
    whole, first = source(), source()
    before = [whole.next_micro_batches(update) for update in range(5)]
    for update in range(2):
        first.next_micro_batches(update)
    state = first.state_dict()
    assert 1.0 < state[CHUNK_LIMIT] < 3.0
    second = source()
    second.load_state_dict(state)
    for update in (2, 3, 4):
        for row, expected in zip(second.next_micro_batches(update), before[update], strict=True):
            assert torch.equal(row.bits, expected.bits) and torch.equal(row.labels, expected.labels)
    assert second.state_dict() == whole.state_dict()


def test_held_out_rows_have_the_length_of_their_update() -> None:
    schedule = ChunkSchedule(CONFIG, sizes())
    plain = HeldOutRows(stream(seed=5), CONFIG, ALONE)(0)
    held_out = HeldOutRows(stream(seed=5), CONFIG, ALONE, chunk_sizes=schedule)
    for update in (0, 2, 9):
        for row, given in zip(held_out(update)[0], plain[0], strict=True):
            assert torch.equal(row.bits, merge_row(given, schedule.limit(update)).bits)


def test_a_position_says_nothing_of_chunks_where_none_are_merged() -> None:
    assert CHUNK_LIMIT not in MicroBatches(stream(), CONFIG, ALONE).state_dict()
