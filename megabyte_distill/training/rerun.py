"""An update's forward and backward pass made twice: where the bits differ, something is not deterministic."""

from __future__ import annotations

import struct

import torch.distributed as dist
from torch import Tensor

from megabyte_distill.data.packing import PackedRow
from megabyte_distill.objectives.objective import Objective
from megabyte_distill.parallel.process_groups import World
from megabyte_distill.training.fingerprints import fingerprints
from megabyte_distill.training.optimizer import TrainerModel, trainable_parameters
from megabyte_distill.training.rng import rng_state, set_rng_state
from megabyte_distill.training.step import Gradients, make_gradients

_SHOWN = 6


class Rerun:
    """The first of two passes; :meth:`compare` is for the second one, which the update is made with.

    The update is the same as without the check: random numbers are drawn again from where they were.
    """

    def __init__(self, trained: TrainerModel, objective: Objective, rows: list[PackedRow], world: World) -> None:
        """Make the first pass. Collective."""
        self._trained, self._world = trained, world
        state = rng_state()
        self._first = make_gradients(trained, objective, rows, world)
        set_rng_state(state)
        self._prints = self._gradient_prints()
        self.differences: tuple[str, ...] = ()
        """After :meth:`compare`: what differs, with both values or the rank; the same on all ranks."""

    def compare(self, second: Gradients) -> None:
        """Look at the second pass before its gradients are used. Collective."""
        first = self._first
        values = {"gradient norm": (first.norm, second.norm)}
        values |= {name: (first.sums[name][0], second.sums[name][0]) for name in first.sums}
        found = [f"{name} {one!r} and {two!r}" for name, (one, two) in values.items() if _bits(one) != _bits(two)]
        same = (self._prints == self._gradient_prints()).all(-1).tolist()
        names = [name for name, _ in trainable_parameters(self._trained.module)]
        here = [name for name, is_same in zip(names, same, strict=True) if not is_same]
        everywhere: list[list[str]] = [[] for _ in range(self._world.size)]
        dist.all_gather_object(everywhere, here)
        for rank, of_rank in enumerate(everywhere):
            if of_rank:
                more = f" and {len(of_rank) - _SHOWN} more" if len(of_rank) > _SHOWN else ""
                found.append(f"on rank {rank} the gradients of {', '.join(of_rank[:_SHOWN])}{more}")
        self.differences = tuple(found)

    def _gradient_prints(self) -> Tensor:
        gradients = (parameter.main_grad for _, parameter in trainable_parameters(self._trained.module))  # type: ignore[attr-defined]
        return fingerprints(gradients, self._world.device)


def _bits(value: float) -> bytes:
    """NaN equals NaN, and 0 is not -0."""
    return struct.pack("d", value)
