"""This rank's micro-batches of each update, from a row stream that all ranks plan alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

from megabyte_distill.config.stage import StageConfig
from megabyte_distill.data.chunk_merging import ChunkLimits, merge_row
from megabyte_distill.data.micro_batch import concatenate_rows
from megabyte_distill.data.packing import PackedRow, without_document_mask
from megabyte_distill.data.sampler import RowPlan
from megabyte_distill.data.stored_targets import StoredTargets
from megabyte_distill.parallel.process_groups import World


class Stream(Protocol):
    """What gives rows: data/sampler.RowStream, or its mock."""

    def next_rows(self, count: int) -> list[Any]: ...

    def materialize(self, plan: Any) -> PackedRow: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


CHUNK_LIMIT = "chunk_limit"
"""Of a saved position: what the last update's tokens were merged with, None for not at all; where there is a schedule.
"""


class MicroBatches:
    """Cuts each update's rows over data-parallel ranks (row i goes to rank i mod ranks) and into micro-batches."""

    def __init__(
        self,
        stream: Stream,
        config: StageConfig,
        world: World,
        *,
        document_mask: bool = True,
        stored_targets: Callable[[RowPlan], StoredTargets] | None = None,
        chunk_sizes: ChunkLimits | None = None,
    ) -> None:
        """``stored_targets``: gives the exact byte targets of a planned row, which then come with it.

        ``chunk_sizes``: which chunks are merged at which update; None: none.
        """
        config.micro_batches(world.data_parallel_size)  # refuses sizes that do not divide
        self._stream, self._config, self._world, self._document_mask = stream, config, world, document_mask
        self._stored_targets, self._chunk_sizes = stored_targets, chunk_sizes
        self._last: list[Any] = []
        self.chunk_limit: float | None = None
        """What the last update's tokens were merged with."""

    def next_micro_batches(self, iteration: int) -> list[PackedRow]:
        """The next update's micro-batches of this rank; ``iteration`` updates of the stage lie before it."""
        self.chunk_limit = None if self._chunk_sizes is None else self._chunk_sizes.limit(iteration)
        self._last = self._stream.next_rows(self._config.global_batch_size)
        mine = self._last[self._world.data_parallel_rank :: self._world.data_parallel_size]
        rows = [self._stream.materialize(plan) for plan in mine]
        if self._stored_targets is not None:
            rows = [replace(row, stored=self._stored_targets(plan)) for row, plan in zip(rows, mine, strict=True)]
        if not self._document_mask:
            rows = [without_document_mask(row) for row in rows]
        size = self._config.micro_batch_size
        joined = (concatenate_rows(rows[first : first + size]) for first in range(0, len(rows), size))
        return [merge_row(row, self.chunk_limit).to(self._world.device) for row in joined]

    def describe_last(self) -> str:
        """Data set and document numbers of the last update."""
        return "; ".join(str(plan) for plan in self._last)[:2000]

    def locate(self, micro_batch: int, byte: int) -> str:
        """Row, data set, document and byte in it of a byte of one of the last update's micro-batches."""
        row, place = divmod(byte, self._config.seq_length)
        number = micro_batch * self._config.micro_batch_size + row  # among this rank's
        number = self._world.data_parallel_rank + number * self._world.data_parallel_size
        plan: RowPlan = self._last[number]
        start = 0
        for segment in plan.segments:
            length = 1 + segment.byte_end - segment.byte_start
            if place < start + length:
                inside = place - start - 1
                where = "its BOS" if inside < 0 else f"byte {segment.byte_start + inside} of it"
                return f"row {number} of the update, data set {plan.dataset}, document {segment.document}, {where}"
            start += length
        return f"row {number} of the update, unused bytes behind its text"

    def state_dict(self) -> dict[str, Any]:
        """Position behind the last update."""
        position = self._stream.state_dict()
        return position if self._chunk_sizes is None else {**position, CHUNK_LIMIT: self.chunk_limit}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a position."""
        self._stream.load_state_dict(state)


class HeldOutRows:
    """The same held-out batches at every evaluation: the first rows of a second stream, read once and kept."""

    def __init__(
        self,
        stream: Stream | None,
        config: StageConfig,
        world: World,
        *,
        document_mask: bool = True,
        chunk_sizes: ChunkLimits | None = None,
    ) -> None:
        """``chunk_sizes``: as in training."""
        self._chunk_sizes = chunk_sizes
        self._batches: list[list[PackedRow]] = []
        if stream is None:
            return
        source = MicroBatches(stream, config, world, document_mask=document_mask)
        self._batches = [source.next_micro_batches(0) for _ in range(config.eval_iters)]

    def __call__(self, iteration: int) -> list[list[PackedRow]]:
        """The batches, their chunks as long as those of the update behind ``iteration`` others."""
        limit = None if self._chunk_sizes is None else self._chunk_sizes.limit(iteration)
        return [[merge_row(row, limit) for row in rows] for rows in self._batches]
