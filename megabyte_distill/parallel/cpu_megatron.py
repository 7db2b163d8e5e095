"""megatron-core on a machine without CUDA (gloo). Does nothing where CUDA is there.

megatron-core hard-codes ``torch.cuda.current_device()``, ``device="cuda"`` and ``Tensor.type() ==
"torch.cuda.FloatTensor"``. The global ``torch`` is left alone: every loaded ``megatron.core`` module gets its own
name ``torch`` rebound to a facade. What is replaced, and nothing else:

=====================================  ==============================================================
symbol, as seen by megatron.core       on this machine
=====================================  ==============================================================
``torch.<factory>(device="cuda")``     the CPU (``FACTORIES`` lists them); ``pin_memory`` is dropped
``torch.cuda.*`` (``_CudaOnCpu``)      device, streams, RNG state of the CPU
``CudaRNGStatesTracker.fork``          forks the CPU generator
``_get/_set_cuda_rng_state``           the CPU generator's state
``get_megatron_optimizer``, clipping   run where ``Tensor.type()`` answers CUDA names
``Tensor.cuda``                        identity (it could only raise before)
=====================================  ==============================================================
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

CPU = torch.device("cpu")

FACTORIES = (
    "zeros", "ones", "empty", "full", "tensor", "arange", "as_tensor", "rand", "randn",
    "zeros_like", "ones_like", "empty_like", "full_like",
)  # fmt: skip

_PRELOAD = (
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.pipeline_parallel.p2p_communication",
    "megatron.core.distributed",
    "megatron.core.optimizer",
    "megatron.core.optimizer.distrib_optimizer",
    "megatron.core.dist_checkpointing",
    "megatron.core.dist_checkpointing.strategies.torch",
    "megatron.core.dist_checkpointing.strategies.fully_parallel",
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.transformer.utils",
    "megatron.core.utils",
    "megatron.core.rerun_state_machine",
)
_PRELOAD_IF_THERE = (
    "megatron.core.dist_checkpointing.strategies.async_utils",
    "megatron.core.dist_checkpointing.strategies.filesystem_async",
    "megatron.core.dist_checkpointing.strategies.state_dict_saver",
)
"""Imported inside functions by some versions, so that the facade would come too late."""


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def make(*args: Any, **kwargs: Any) -> torch.Tensor:
        device = kwargs.get("device")
        # an int or "cuda" names an accelerator (torch.device of an int raises where there is none); None stays
        if isinstance(device, int) or (device is not None and torch.device(device).type == "cuda"):
            kwargs["device"] = CPU
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return make


class _NullStream(contextlib.nullcontext):  # type: ignore[type-arg]
    """A stream on which everything has already happened."""

    def wait_stream(self, other: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def record_event(self, event: Any = None) -> None: ...

    def synchronize(self) -> None: ...


class _CudaOnCpu(types.ModuleType):
    """``torch.cuda`` as megatron.core's modules see it."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)

    def current_device(self) -> torch.device:
        return CPU

    def synchronize(self, device: Any = None) -> None: ...

    def empty_cache(self) -> None: ...

    def manual_seed(self, seed: int) -> None:
        torch.default_generator.manual_seed(seed)

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)

    def current_stream(self, device: Any = None) -> _NullStream:
        return _NullStream()

    default_stream = current_stream

    def Stream(self, *args: Any, **kwargs: Any) -> _NullStream:  # torch's name
        return _NullStream()

    def stream(self, stream: Any) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


class _TorchOnCpu(types.ModuleType):
    """``torch`` as megatron.core's modules see it."""

    applied = False

    def __init__(self) -> None:
        super().__init__("torch")
        self.applied = False
        self.cuda = _CudaOnCpu("torch.cuda")
        for name in FACTORIES:
            setattr(self, name, _on_cpu(getattr(torch, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


_FACADE = _TorchOnCpu()


@contextlib.contextmanager
def _cuda_type_names() -> Iterator[None]:
    """Inside, ``Tensor.type()`` answers "torch.cuda.FloatTensor" for a CPU float tensor."""
    real = torch.Tensor.type

    def cuda_name(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        out = real(self, *args, **kwargs)
        return out.replace("torch.", "torch.cuda.", 1) if isinstance(out, str) else out

    torch.Tensor.type = cuda_name  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        torch.Tensor.type = real  # type: ignore[method-assign]


def _patch_rng() -> None:
    from megatron.core.tensor_parallel import random as megatron_random

    class CpuRNGStatesTracker(megatron_random.CudaRNGStatesTracker):  # type: ignore[misc]
        @contextlib.contextmanager
        def fork(self, name: str = megatron_random._MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator[None]:
            if name not in self.states_:
                raise KeyError(f"RNG state {name!r} was never added; known: {sorted(self.states_)}")
            saved = torch.get_rng_state()
            torch.set_rng_state(self.states_[name])
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()
                torch.set_rng_state(saved)

    megatron_random.CudaRNGStatesTracker = CpuRNGStatesTracker
    megatron_random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)


def _patch_type_checks() -> None:
    import megatron.core.optimizer as megatron_optimizer
    from megatron.core.optimizer import optimizer as optimizer_module

    megatron_optimizer.get_megatron_optimizer = _cuda_type_names()(megatron_optimizer.get_megatron_optimizer)
    optimizer_module.clip_grad_by_total_norm_fp32 = _cuda_type_names()(optimizer_module.clip_grad_by_total_norm_fp32)


def apply() -> bool:
    """Make megatron.core usable without CUDA; True where the facade is in place, False where CUDA is there.

    Idempotent. Call it before the first megatron object is built, and again after importing more of megatron.core.
    """
    if torch.cuda.is_available():
        return False
    if not _FACADE.applied:
        for name in _PRELOAD:
            importlib.import_module(name)
        for name in _PRELOAD_IF_THERE:
            with contextlib.suppress(ModuleNotFoundError):
                importlib.import_module(name)
        _patch_rng()
        _patch_type_checks()
        torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
        _FACADE.applied = True
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and module.__dict__.get("torch") is torch:
            module.__dict__["torch"] = _FACADE
    return True
