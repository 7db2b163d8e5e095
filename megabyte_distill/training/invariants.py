"""What must hold at every update, checked while the run goes on (``--check-invariants N``)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from megabyte_distill.parallel.process_groups import World
from megabyte_distill.training.failures import TrainingFailure
from megabyte_distill.training.fingerprints import fingerprints

_SHOWN = 8

FurtherInvariant = Callable[[], list[str]]
"""Called by all ranks together; what is broken on this one, each in a line that names the ranks."""


class Invariants:
    """Of one stage's model, from what it is when this object is made.

    - Weights are equal on all data-parallel ranks, bit for bit.
    - Weights that tensor parallelism does not cut are equal on all its ranks.
    - Frozen weights keep every bit.
    - Gradients are finite: each, also those that a rank does not count into the gradient's norm.
    """

    def __init__(self, model: nn.Module, world: World, further: Sequence[FurtherInvariant] = ()) -> None:
        self._world, self._further = world, further
        self._parameters = dict(model.named_parameters())
        self._frozen = [name for name, parameter in self._parameters.items() if not parameter.requires_grad]
        self._frozen_prints = self._prints(self._frozen)

    def check(self, where: str, *, gradients: bool = True) -> None:
        """TrainingFailure on all ranks that names ``where``, each broken invariant, its parameter and the ranks.

        Collective. ``gradients``: whether there are any to check.
        """
        broken = [
            *self._unequal(list(self._parameters), parallel_state.get_data_parallel_group(), "data-parallel"),
            *self._unequal(self._replicated(), parallel_state.get_tensor_model_parallel_group(), "tensor-parallel"),
            *self._changed(),
            *(self._not_finite() if gradients else ()),
            *(line for further in self._further for line in further()),
        ]
        everywhere: list[list[str]] = [[] for _ in range(self._world.size)]
        dist.all_gather_object(everywhere, broken)
        found = list(dict.fromkeys(line for of_rank in everywhere for line in of_rank))
        if found:
            shown = "\n  ".join(found[:_SHOWN]) + (f"\n  and {len(found) - _SHOWN} more" if len(found) > _SHOWN else "")
            raise TrainingFailure(
                f"{where}: {len(found)} broken invariants (--check-invariants):\n  {shown}\n"
                "Nothing of this update is saved. Go on from the last checkpoint; where it happens again at the same "
                "update it is the program's fault, where not, look at the machine of the rank that differs"
            )

    def _prints(self, names: Sequence[str]) -> Tensor:
        return fingerprints((self._parameters[name] for name in names), self._world.device)

    def _replicated(self) -> list[str]:
        return [n for n, p in self._parameters.items() if not getattr(p, "tensor_model_parallel", False)]

    def _unequal(self, names: list[str], group: dist.ProcessGroup, kind: str) -> list[str]:
        ranks = dist.get_process_group_ranks(group)
        if len(ranks) == 1 or not names:
            return []
        own = self._prints(names)
        gathered = [torch.empty_like(own) for _ in ranks]
        dist.all_gather(gathered, own, group=group)
        prints = torch.stack(gathered, dim=1).tolist()  # [names, ranks, 2]
        return [
            f"{name} differs over {kind} ranks: {_parties(ranks, of_ranks)}"
            for name, of_ranks in zip(names, prints, strict=True)
            if any(one != of_ranks[0] for one in of_ranks)
        ]

    def _changed(self) -> list[str]:
        same = (self._prints(self._frozen) == self._frozen_prints).all(-1).tolist()
        names = [name for name, is_same in zip(self._frozen, same, strict=True) if not is_same]
        return [f"{name} is frozen and has changed on rank {self._world.rank}" for name in names]

    def _not_finite(self) -> list[str]:
        gradients = {
            name: gradient
            for name, parameter in self._parameters.items()
            if (gradient := getattr(parameter, "main_grad", parameter.grad)) is not None
        }
        finite = [bool(torch.isfinite(gradient).all()) for gradient in gradients.values()]
        names = [name for name, is_finite in zip(gradients, finite, strict=True) if not is_finite]
        return [f"the gradient of {name} is not finite on rank {self._world.rank}" for name in names]


def _parties(ranks: Sequence[int], prints: Sequence[list[int]]) -> str:
    """Ranks that agree, party by party: ``0, 2 | 1``."""
    parties: dict[tuple[int, ...], list[int]] = {}
    for rank, one in zip(ranks, prints, strict=True):
        parties.setdefault(tuple(one), []).append(rank)
    return " | ".join(", ".join(map(str, party)) for party in parties.values())
