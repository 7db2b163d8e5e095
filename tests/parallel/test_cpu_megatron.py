"""The facade replaces what its table says for megatron.core and nothing for anybody else."""

from __future__ import annotations

import sys

import pytest
import torch

from megabyte_distill.parallel import cpu_megatron

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is there: the facade does nothing")


@pytest.fixture(autouse=True)
def _applied() -> None:
    assert cpu_megatron.apply()


def megatron_torch() -> torch:  # type: ignore[valid-type]
    """``torch`` as a megatron.core module sees it."""
    from megatron.core import parallel_state

    return parallel_state.torch


@pytest.mark.parametrize("name", cpu_megatron.FACTORIES)
@pytest.mark.parametrize("device", ["cuda", "cuda:0", torch.device("cuda"), 0, None, "cpu", "meta"])
def test_factories_make_cuda_tensors_on_the_cpu(name: str, device: object) -> None:
    if name.endswith("_like"):
        first: tuple[object, ...] = (torch.zeros(2),)
    else:
        first = {"tensor": ([0.0, 0.0],), "as_tensor": ([0.0, 0.0],), "full": ((2,),)}.get(name, (2,))
    if name.startswith("full"):
        first = (*first, 1.0)
    made = getattr(megatron_torch(), name)(*first, device=device)
    assert made.shape == (2,) and made.device.type == ("meta" if device == "meta" else "cpu")


def test_pinned_memory_is_plain_memory() -> None:
    assert not megatron_torch().empty(2, pin_memory=True).is_pinned()


def test_the_global_torch_still_refuses_cuda() -> None:
    assert megatron_torch() is not torch
    for call in (lambda: torch.zeros(1, device="cuda"), torch.cuda.current_device):
        with pytest.raises((AssertionError, RuntimeError)):
            call()
    assert torch.zeros.__module__ is None or "cpu_megatron" not in torch.zeros.__module__
    assert torch.cuda.__name__ == "torch.cuda" and type(torch.cuda) is type(sys)
    assert torch.zeros(1).type() == "torch.FloatTensor"


def test_only_modules_of_megatron_core_see_the_facade() -> None:
    facade = megatron_torch()
    holders = [name for name, module in list(sys.modules.items()) if getattr(module, "torch", None) is facade]
    assert holders and all(name.startswith("megatron.core") for name in holders)
    left = [
        name
        for name, module in list(sys.modules.items())
        if name.startswith("megatron.core") and getattr(module, "torch", None) is torch
    ]
    assert left == []


def test_everything_else_is_torchs_own() -> None:
    facade = megatron_torch()
    for name in ("Tensor", "nn", "float32", "distributed", "matmul", "no_grad", "is_tensor"):
        assert getattr(facade, name) is getattr(torch, name)
    assert facade.cuda.is_available is torch.cuda.is_available
    with pytest.raises(AttributeError):
        _ = facade.there_is_no_such_function
    with pytest.raises(AttributeError):
        _ = facade.cuda.there_is_no_such_function


def test_device_and_streams_are_the_cpus() -> None:
    cuda = megatron_torch().cuda
    assert cuda.current_device() == torch.device("cpu")
    cuda.synchronize()
    cuda.empty_cache()
    stream = cuda.Stream()
    for other in (stream, cuda.current_stream(), cuda.default_stream()):
        other.wait_stream(stream)
        other.wait_event(None)
        other.record_event()
        other.synchronize()
        with cuda.stream(other), other:
            pass


def test_random_state_is_the_cpu_generators() -> None:
    cuda = megatron_torch().cuda
    cuda.manual_seed(5)
    state = cuda.get_rng_state()
    first = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3), first)
    cuda.set_rng_state(state)
    assert torch.equal(torch.rand(3), first)


def test_a_forked_state_goes_on_by_itself_and_leaves_the_other_alone() -> None:
    from megatron.core.tensor_parallel import random as megatron_random

    tracker = megatron_random.CudaRNGStatesTracker()
    torch.manual_seed(1)
    tracker.add("mine", 7)
    plain = torch.rand(2)
    torch.manual_seed(1)
    with tracker.fork("mine"):
        inside = torch.rand(4)
    assert torch.equal(torch.rand(2), plain)
    torch.manual_seed(7)
    assert torch.equal(torch.rand(4), inside)
    with tracker.fork("mine"):
        assert not torch.equal(torch.rand(4), inside)
    with pytest.raises(KeyError, match="'other' was never added"), tracker.fork("other"):
        pass


def test_a_fork_that_raises_still_restores() -> None:
    from megatron.core.tensor_parallel import random as megatron_random

    tracker = megatron_random.CudaRNGStatesTracker()
    tracker.add("mine", 7)
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="stop"), tracker.fork("mine"):
        torch.rand(1)
        raise RuntimeError("stop")
    assert torch.equal(torch.get_rng_state(), before)


def test_megatrons_rng_state_is_the_cpu_generators() -> None:
    from megatron.core.tensor_parallel import random as megatron_random

    state = megatron_random._get_cuda_rng_state()
    assert torch.equal(state, torch.get_rng_state())
    first = torch.rand(2)
    megatron_random._set_cuda_rng_state(state)
    assert torch.equal(torch.rand(2), first)


def test_type_names_are_cudas_inside_only_and_after_an_error_too() -> None:
    tensor = torch.zeros(1)
    with cpu_megatron._cuda_type_names():
        assert tensor.type() == "torch.cuda.FloatTensor"
        assert tensor.bfloat16().type() == "torch.cuda.BFloat16Tensor"
        assert tensor.type(torch.float64).dtype is torch.float64
    assert tensor.type() == "torch.FloatTensor"
    with pytest.raises(RuntimeError), cpu_megatron._cuda_type_names():
        raise RuntimeError
    assert tensor.type() == "torch.FloatTensor"


def test_moving_a_tensor_to_cuda_leaves_it_here() -> None:
    tensor = torch.zeros(2)
    assert tensor.cuda() is tensor and tensor.cuda(0, non_blocking=True) is tensor


def test_applying_again_changes_nothing() -> None:
    import megatron.core.optimizer as megatron_optimizer
    from megatron.core.tensor_parallel import random as megatron_random

    def seen() -> tuple[object, ...]:
        return (
            megatron_torch(),
            megatron_random.CudaRNGStatesTracker,
            megatron_random._get_cuda_rng_state,
            megatron_optimizer.get_megatron_optimizer,
            torch.Tensor.cuda,
            torch.Tensor.type,
        )

    before = seen()
    assert cpu_megatron.apply() and cpu_megatron.apply()
    assert all(now is then for now, then in zip(seen(), before, strict=True))


def test_modules_imported_later_are_reached_by_the_next_call(monkeypatch: pytest.MonkeyPatch) -> None:
    late = type(sys)("megatron.core.made_up_for_this_test")
    late.torch = torch  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, late.__name__, late)
    cpu_megatron.apply()
    assert late.torch is megatron_torch()


def test_it_does_nothing_where_cuda_is(monkeypatch: pytest.MonkeyPatch) -> None:
    late = type(sys)("megatron.core.made_up_for_this_test")
    late.torch = torch  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, late.__name__, late)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not cpu_megatron.apply()
    assert late.torch is torch
