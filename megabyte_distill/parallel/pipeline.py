"""This rank's place in the pipeline, and what the ranks of one pipeline tell each other."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from torch import nn


def is_first_stage() -> bool:
    """True where the encoder and the router are."""
    return bool(parallel_state.is_pipeline_first_stage(ignore_virtual=True))


def is_last_stage() -> bool:
    """True where the decoder and the token head are."""
    return bool(parallel_state.is_pipeline_last_stage(ignore_virtual=True))


def pipeline_size() -> int:
    """Number of stages."""
    return int(parallel_state.get_pipeline_model_parallel_world_size())


def shared_along_pipeline(value: Any, *, from_first: bool) -> Any:
    """The first (else the last) stage's picklable ``value``, on every stage. Collective over each pipeline."""
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


def trains_on_stages(module: nn.Module) -> list[bool]:
    """Which stages, in order, have a parameter that trains. Collective over each pipeline."""
    own = any(parameter.requires_grad for parameter in module.parameters())
    if pipeline_size() == 1:
        return [own]
    found: list[bool] = [False] * pipeline_size()
    dist.all_gather_object(found, own, group=parallel_state.get_pipeline_model_parallel_group())
    return found


def is_any_before(of_stages: list[bool]) -> bool:
    """True where one of the stages before this one is marked."""
    return any(of_stages[: parallel_state.get_pipeline_model_parallel_rank()])
