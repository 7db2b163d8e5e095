"""The states of random number generators: this rank's, and what a checkpoint keeps of all ranks'.

Each rank has the CPU's generator and, on CUDA, the device's; megatron's tracker keeps further ones, which differ over
tensor- and pipeline-parallel ranks. A checkpoint holds every rank's states by its place in pipeline × tensor × data
parallelism. At the same sizes each rank takes up its own. At other sizes there is no such place: every rank takes the
first one's CPU and device states, which are alike on all of them as long as nothing is drawn on some ranks only, and
the tracker keeps the streams it was seeded with for the new sizes.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch.distributed import get_rank

KEY = "rng"


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def rng_state() -> dict[str, Any]:
    """Everything this rank draws from, as it is now."""
    return {
        "cpu": torch.get_rng_state(),
        "device": _device(),
        "cuda": torch.cuda.get_rng_state() if _device() == "cuda" else None,
        "tracker": {name: state.clone() for name, state in get_cuda_rng_tracker().get_states().items()},
    }


def set_rng_state(state: dict[str, Any], *, tracker: bool = True) -> None:
    """Go on drawing from a state of :func:`rng_state`; ``tracker``: megatron's streams too."""
    torch.set_rng_state(state["cpu"])
    if state["device"] != _device():
        return  # the generators of another device have other states
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])
    if tracker:
        get_cuda_rng_tracker().set_states({name: value.clone() for name, value in state["tracker"].items()})


def sharded_rng_state() -> ShardedObject:
    """This rank's states for a checkpoint."""
    return _shard(rng_state(), _sizes(), _place())


def load_rng_state(checkpoint: Path) -> str | None:
    """Take up the states of a checkpoint; says what could not be taken up exactly, None where all was."""
    stored = _stored_sizes(serialization.load_sharded_metadata(str(checkpoint)).values())
    if stored is None:  # written by an earlier version
        torch.set_rng_state(dist_checkpointing.load_common_state_dict(str(checkpoint))[KEY])
        return None
    same = stored == _sizes()
    wanted = _shard(None, stored, _place() if same else (0, 0, 0))
    state = dist_checkpointing.load({KEY: wanted}, str(checkpoint), validate_access_integrity=False)[KEY]
    set_rng_state(state, tracker=same)
    if state["device"] != _device():
        return f"random numbers of the {state['device']} cannot be continued on the {_device()}"
    if same:
        return None
    return (
        f"random number streams were saved at pipeline × tensor × data parallelism {_spelled(stored)} and start anew "
        f"at {_spelled(_sizes())}, where a layer draws any"
    )


def _spelled(sizes: Iterable[int]) -> str:
    return " × ".join(map(str, sizes))


def _shard(state: Any, sizes: tuple[int, ...], place: tuple[int, ...]) -> ShardedObject:
    # at other sizes than the stored ones all ranks read the same part, and one of them counts as its owner
    replica = 0 if sizes == _sizes() else get_rank()
    return ShardedObject(KEY, state, sizes, place, replica_id=replica)


def _sizes() -> tuple[int, ...]:
    return (
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_data_parallel_world_size(),
    )


def _place() -> tuple[int, ...]:
    return (
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_data_parallel_rank(),
    )


def _stored_sizes(entries: Iterable[Any]) -> tuple[int, ...] | None:
    sizes = (tuple(e.global_shape) for e in entries if isinstance(e, ShardedObject) and e.key == KEY)
    return next(sizes, None)
