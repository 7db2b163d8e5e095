"""megatron's distributed optimizer over torch's AdamW: its saved state taken up exactly.

megatron-core's own load is not exact there: it fails where nothing was updated yet, asks the saved state for a step
count of each parameter that it keeps once, and gives all parameters one and the same tensor as their step count, which
the next update then raises once for every parameter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist


def is_over_torch(part: Any) -> bool:
    """Whether a distributed optimizer's inner one is torch's."""
    return type(part.optimizer).__module__.startswith("torch.optim")


def allocate_state(part: Any) -> None:
    """Zero moments and a step count of 0 for every parameter that has none: what torch does at the first update."""
    for group in part.optimizer.param_groups:
        for parameter in group["params"]:
            state = part.optimizer.state[parameter]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)


def describe(part: Any, weights: Mapping[str, Any], *, is_loading: bool, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """megatron's ``sharded_state_dict``, also on a rank that trains nothing (a pipeline stage); collective.

    megatron reads the common settings off this rank's own parameters, and fails where there are none: such a rank takes
    them from another.
    """
    own = part.sharded_state_dict(weights, is_loading=is_loading, metadata=metadata) if part.optimizer.state else None
    common = None if own is None else {name: value for name, value in own.items() if name != "param_state"}
    everybodys: list[dict[str, Any] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everybodys, common)
    if own is None:
        return {**next(settings for settings in everybodys if settings is not None), "param_state": {}}
    if is_loading:
        _own_step_counts(part)
    return own  # type: ignore[no-any-return]


def _own_step_counts(part: Any) -> None:
    """Give each parameter a step count of its own again."""
    for state in part.optimizer.state.values():
        state["step"] = state["step"].clone()


def load_state(part: Any, loaded: Mapping[str, Any]) -> None:
    """Take up what ``sharded_state_dict`` with sharding type ``fully_reshardable`` described and a checkpoint held."""
    if not part.optimizer.state:
        return
    part.load_state_dict({name: value for name, value in loaded.items() if not name.startswith("param_state")})
    _own_step_counts(part)
    states = list(part.optimizer.state.values())
    steps = [state.pop("step") for state in states]
    try:
        part.load_parameter_state_from_fully_reshardable(loaded["param_state"])
    finally:
        for state, step in zip(states, steps, strict=True):
            state["step"] = step
