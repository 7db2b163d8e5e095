"""Start and end of the process groups: one call for torchrun's ranks and for a single process without torchrun."""

from __future__ import annotations

import contextlib
import datetime
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megabyte_distill.parallel import cpu_megatron


class FailureElsewhere(ValueError):
    """The main rank could not do something for all; it has said why itself."""


@dataclass(frozen=True, slots=True)
class World:
    """This process's place among the ranks."""

    rank: int
    size: int
    data_parallel_rank: int
    data_parallel_size: int
    data_parallel_group: dist.ProcessGroup
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True on the one rank that writes logs and small files."""
        return self.rank == 0


def on_main_rank(world: World, action: Callable[[], object]) -> None:
    """Do something on the main rank while the others wait; where it fails with ValueError or OSError, all ranks raise.

    The main rank raises its own error, the others :class:`FailureElsewhere`.
    """
    error: Exception | None = None
    if world.is_main:
        try:
            action()
        except (ValueError, OSError) as caught:
            error = caught
    outcome = [None if error is None else str(error)]
    dist.broadcast_object_list(outcome, src=0)
    if error is not None:
        raise error
    if outcome[0] is not None:
        raise FailureElsewhere(outcome[0])


def torchrun_environment() -> tuple[int, int]:
    """(rank, world size) as torchrun's environment says; (0, 1) without it. Known before process groups are up."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def _init_torch(timeout: datetime.timedelta) -> torch.device:
    use_cuda = torch.cuda.is_available()
    backend = "cpu:gloo,cuda:nccl" if use_cuda else "gloo"
    if use_cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:  # a plain python process: a world of one that needs no port
        rendezvous = tempfile.NamedTemporaryFile(prefix="megabyte-distill-", delete=False)  # noqa: SIM115
        rendezvous.close()
        os.unlink(rendezvous.name)
        dist.init_process_group(backend, init_method=f"file://{rendezvous.name}", rank=0, world_size=1, timeout=timeout)
    return torch.device("cuda", torch.cuda.current_device()) if use_cuda else torch.device("cpu")


@contextlib.contextmanager
def world(
    *, tensor_parallel: int = 1, pipeline_parallel: int = 1, seed: int = 1, timeout_minutes: float = 10.0
) -> Iterator[World]:
    """Initialise torch.distributed and megatron's parallel state, yield the :class:`World`, take both down again.

    Under torchrun its environment is used; without it a world of one process is made. Where process groups are up
    already (a tool that calls another) they are used and left up.
    """
    cpu_megatron.apply()
    from megatron.core import parallel_state

    if parallel_state.model_parallel_is_initialized():
        yield current_world()
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _init_torch(datetime.timedelta(minutes=timeout_minutes))
    try:
        _init_model_parallel(tensor_parallel, pipeline_parallel, seed, timeout_minutes)
        yield current_world()
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def _init_model_parallel(tensor_parallel: int, pipeline_parallel: int, seed: int, timeout_minutes: float) -> None:
    from megatron.core import parallel_state
    from megatron.core import tensor_parallel as megatron_tp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parallel_state.initialize_model_parallel(
            tensor_parallel, pipeline_parallel, distributed_timeout_minutes=timeout_minutes
        )
        megatron_tp.model_parallel_cuda_manual_seed(seed)


def regroup(
    *,
    tensor_parallel: int,
    pipeline_parallel: int,
    virtual_stages: int = 1,
    seed: int = 1,
    timeout_minutes: float = 10.0,
) -> World:
    """Cut the ranks that are up in another way. Models of the old cut cannot be used any more; collective.

    ``virtual_stages``: of each rank of a pipeline.
    """
    from megatron.core import parallel_state

    from megabyte_distill.parallel.pipeline import set_virtual_size

    now = (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_world_size(),
    )
    if now != (tensor_parallel, pipeline_parallel):
        parallel_state.destroy_model_parallel()
        _init_model_parallel(tensor_parallel, pipeline_parallel, seed, timeout_minutes)
    set_virtual_size(virtual_stages)
    return current_world()


def current_world() -> World:
    """The :class:`World` of process groups that are up."""
    from megatron.core import parallel_state

    on_cuda = torch.cuda.is_available()
    return World(
        rank=dist.get_rank(),
        size=dist.get_world_size(),
        data_parallel_rank=parallel_state.get_data_parallel_rank(),
        data_parallel_size=parallel_state.get_data_parallel_world_size(),
        data_parallel_group=parallel_state.get_data_parallel_group(),
        device=torch.device("cuda", torch.cuda.current_device()) if on_cuda else torch.device("cpu"),
    )
