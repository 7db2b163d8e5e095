"""This rank's place in the pipeline, and what the ranks of one pipeline tell each other.

A rank holds one part of the model, or under virtual pipeline stages several: layers go to virtual stage 0 of every
rank in turn, then to virtual stage 1 of every rank, and so on. A model of several parts is a :class:`VirtualStages`;
everything that treats parts one by one takes them from :func:`virtual_stages`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import nn


class VirtualStages(nn.ModuleDict):
    """A rank's parts of a model, in the order of their virtual stages; no layer that can be called."""

    def __init__(self, parts: list[nn.Module]) -> None:
        super().__init__({f"virtual_stage_{number}": part for number, part in enumerate(parts)})


_PART = re.compile(r"^virtual_stage_\d+\.")


def virtual_stages(model: nn.Module) -> list[Any]:
    """The parts of a model that this rank holds: of a :class:`VirtualStages` each one, else the model itself."""
    return list(model.values()) if isinstance(model, VirtualStages) else [model]


def name_in_part(name: str) -> str:
    """What a part calls the parameter that the whole model calls ``name``."""
    return _PART.sub("", name, count=1)


def joined(parts: list[nn.Module]) -> nn.Module:
    """The model of which :func:`virtual_stages` gives these parts."""
    return parts[0] if len(parts) == 1 else VirtualStages(parts)


def built_in_stages(build: Callable[[int], nn.Module]) -> nn.Module:
    """What ``build`` makes of each virtual stage's number; each draws the same random numbers from torch's generator.

    So the weights of a part do not depend on how many parts there are before it on the same rank.
    """
    state = torch.get_rng_state()
    parts = []
    for number in range(virtual_size()):
        torch.set_rng_state(state)
        parts.append(build(number))
    return joined(parts)


def virtual_size() -> int:
    """Number of virtual stages of each rank, 1 without them."""
    return parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1


def set_virtual_size(number: int) -> None:
    """Have what is built from now on be cut into that many virtual stages a rank."""
    parallel_state.set_virtual_pipeline_model_parallel_world_size(number if number > 1 else None)


def is_first_stage(virtual_stage: int) -> bool:
    """True where the encoder and the router are."""
    return bool(parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=virtual_stage))


def is_last_stage(virtual_stage: int) -> bool:
    """True where the decoder and the token head are."""
    return bool(parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=virtual_stage))


def pipeline_size() -> int:
    """Number of ranks in a pipeline."""
    return int(parallel_state.get_pipeline_model_parallel_world_size())


def pipeline_place(virtual_stage: int) -> int:
    """How many stages of the pipeline a micro-batch passes before it comes to this rank's virtual stage."""
    return virtual_stage * pipeline_size() + int(parallel_state.get_pipeline_model_parallel_rank())


def shared_along_pipeline(value: Any, *, from_first: bool) -> Any:
    """The first (else the last) rank's picklable ``value``, on every rank. Collective over each pipeline."""
    if pipeline_size() == 1:
        return value
    box = [value]
    first, last = (
        parallel_state.get_pipeline_model_parallel_first_rank(),
        parallel_state.get_pipeline_model_parallel_last_rank(),
    )
    group = parallel_state.get_pipeline_model_parallel_group()
    dist.broadcast_object_list(box, src=first if from_first else last, group=group)
    return box[0]


def trains_on_stages(model: nn.Module) -> list[bool]:
    """Which stages, in a micro-batch's order, have a parameter that trains. Collective over each pipeline."""
    own = [any(parameter.requires_grad for parameter in part.parameters()) for part in virtual_stages(model)]
    if pipeline_size() == 1:
        return own
    of_ranks: list[list[bool]] = [[]] * pipeline_size()
    dist.all_gather_object(of_ranks, own, group=parallel_state.get_pipeline_model_parallel_group())
    return [trains for of_virtual_stage in zip(*of_ranks, strict=True) for trains in of_virtual_stage]
