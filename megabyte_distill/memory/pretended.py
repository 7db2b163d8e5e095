"""One process that takes itself for one rank of many, and builds and runs that rank's part without its memory.

Collectives do nothing and every floating-point tensor is a meta tensor; whole numbers and booleans (bytes, bits,
lengths) keep their values, so that data-dependent shapes come out as they would.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

from megabyte_distill.parallel import cpu_megatron
from megabyte_distill.parallel.pipeline import set_virtual_size

META = torch.device("meta")


@contextlib.contextmanager
def pretended_world(
    *,
    rank: int = 0,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    virtual_stages: int = 1,
    data_parallel: int = 1,
) -> Iterator[None]:
    """torch.distributed and megatron's parallel state as that rank has them; ValueError where process groups are up."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    cpu_megatron.apply()
    from megatron.core import parallel_state
    from megatron.core import tensor_parallel as megatron_tp

    if dist.is_initialized():
        raise ValueError("process groups are up; what a rank needs is reckoned in a process without any")
    size = tensor_parallel * pipeline_parallel * data_parallel
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
        gather = dist.all_gather_object
        try:
            parallel_state.initialize_model_parallel(
                tensor_parallel, pipeline_parallel, create_gloo_process_groups=False
            )
            set_virtual_size(virtual_stages)
            megatron_tp.model_parallel_cuda_manual_seed(1)
            dist.all_gather_object = _everybody_says_the_same  # type: ignore[assignment]
            yield
        finally:
            dist.all_gather_object = gather
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()


def _everybody_says_the_same(gathered: list[Any], own: Any, group: Any = None) -> None:
    gathered[:] = [own] * len(gathered)


@contextlib.contextmanager
def weightless() -> Iterator[None]:
    """Whatever is built inside lies on the meta device, also where megatron names another one."""
    real = torch.Tensor.type

    def named(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        # megatron asks for "torch.cuda.FloatTensor" before it makes an optimizer
        with torch._C.DisableTorchFunction():
            name = real(self, *args, **kwargs)
        wanted = "torch." if not torch.cuda.is_available() else "torch.cuda."  # the CPU facade adds the rest
        return name.replace("torch.meta.", wanted) if isinstance(name, str) else name

    torch.Tensor.type = named  # type: ignore[method-assign,assignment]
    try:
        with META, _OnMeta(), WithoutValues():  # type: ignore[no-untyped-call]
            yield
    finally:
        torch.Tensor.type = real  # type: ignore[method-assign]


class _OnMeta(TorchFunctionMode):
    """A device that is named is the meta device, but for the seeds that a model draws."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        moves = (kwargs or {}).get("device") is not None and func is not torch.randint
        named = {"device": META} if moves else {}
        return func(*args, **{**(kwargs or {}), **named})


class WithoutValues(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While active, meta tensors and real ones meet: in such an operation the real ones count by their shapes.

    New floating-point tensors lie on the meta device. What would be copied from it stays there, and a number read from
    it is 1.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [value for value in tree_iter((args, kwargs)) if isinstance(value, Tensor)]
        if not tensors and "device" in kwargs and _makes_floats(func, kwargs.get("dtype")):
            return func(*args, **{**kwargs, "device": META})
        if func is torch.ops.aten._to_copy.default and not (args[0].is_meta or args[0].is_floating_point()):
            return func(*args, **{**kwargs, "device": None})  # whole numbers keep their values
        if not any(tensor.is_meta for tensor in tensors):
            return func(*args, **kwargs)
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1.0 if args[0].is_floating_point() else 1
        if func is torch.ops.aten._to_copy.default:
            kwargs = {**kwargs, "device": META}
        if func in _INDEXING:
            args = (args[0], [place for mask in args[1] for place in _places(mask)], *args[2:])
        args, kwargs = tree_map(_shape_alone, (args, kwargs))
        return func(*args, **kwargs)


@contextlib.contextmanager
def fused_attention() -> Iterator[None]:
    """Inside, meta tensors attend as the fused kernels do, which keep no square of scores."""
    real = functional.scaled_dot_product_attention

    def attend(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not query.is_meta:
            return real(query, *args, **kwargs)
        if kwargs.get("attn_mask") is not None:  # torch makes numbers of it, and keeps them
            kwargs["attn_mask"] = torch.empty_like(kwargs["attn_mask"], dtype=query.dtype, device=META)
        out: Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, *args, **kwargs)[0]
        return out

    # no TorchFunctionMode: what a backward pass computes again does not go through one
    functional.scaled_dot_product_attention = attend
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = real


def _makes_floats(func: Any, dtype: torch.dtype | None) -> bool:
    makes_whole = func._overloadpacket in (torch.ops.aten.arange, torch.ops.aten.randint)
    return not makes_whole if dtype is None else dtype.is_floating_point


_INDEXING = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default)


def _places(index: Tensor | None) -> Sequence[Tensor | None]:
    """A mask as the indices it stands for: how many there are is in its values."""
    is_mask = index is not None and index.dtype is torch.bool and not index.is_meta
    return index.nonzero(as_tuple=True) if index is not None and is_mask else [index]


def _shape_alone(value: Any) -> Any:
    return value.to(META) if isinstance(value, Tensor) else value
