"""How many micro-batches of each virtual stage a rank has in flight at its worst moment, by megatron's own schedule."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches, get_schedule_table


class Worst(NamedTuple):
    """The moment at which a rank's activations take most."""

    size: int
    """Bytes."""
    in_flight: tuple[int, ...]
    """Micro-batches of each virtual stage whose forward has begun and whose backward is not done."""


def worst_moment(kept: Sequence[int], peak: Sequence[int], micro_batches: int, group: int) -> Worst:
    """Of this rank (of process groups that are up, also pretended).

    ``kept``: bytes that a micro-batch keeps for its backward pass, of each virtual stage; ``peak``: the most that its
    forward and backward have alive at once; ``group``: micro-batches that a virtual stage takes at a turn.
    """
    alive = [0] * len(kept)
    worst = Worst(0, tuple(alive))
    for virtual_stage, is_forward in _passes(len(kept), micro_batches, group):
        alive[virtual_stage] += is_forward
        others = sum(number * size for number, size in zip(alive, kept, strict=True)) - kept[virtual_stage]
        worst = max(worst, Worst(others + max(kept[virtual_stage], peak[virtual_stage]), tuple(alive)))
        alive[virtual_stage] -= not is_forward
    return worst


def _passes(virtual_stages: int, micro_batches: int, group: int) -> Iterator[tuple[int, bool]]:
    """(virtual stage, whether forward) of each pass of this rank, in order."""
    order = [stage for _, stage in get_schedule_table(micro_batches, virtual_stages, group)]
    _, _, warm_up, _ = get_pp_rank_microbatches(micro_batches, virtual_stages, group)
    yield from ((stage, True) for stage in order[:warm_up])
    backward = iter([virtual_stages - 1 - stage for stage in order])
    for stage in order[warm_up:]:
        yield stage, True
        yield next(backward), False
    yield from ((stage, False) for stage in backward)
