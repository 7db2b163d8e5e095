"""One process without torchrun: groups come up, serve nested calls, and go down again."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist

from megabyte_distill.parallel.process_groups import World, current_world, torchrun_environment, world


def is_up() -> bool:
    from megatron.core import parallel_state

    return dist.is_initialized() or parallel_state.model_parallel_is_initialized()


def check(one: World) -> None:
    assert (one.rank, one.size, one.data_parallel_rank, one.data_parallel_size) == (0, 1, 0, 1)
    assert one.is_main and one.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    value = torch.ones(2, device=one.device)
    dist.all_reduce(value, group=one.data_parallel_group)
    assert value.tolist() == [1.0, 1.0]


@pytest.fixture(autouse=True)
def _no_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


def test_a_world_comes_up_and_goes_down() -> None:
    assert not is_up()
    with world() as one:
        check(one)
        assert current_world() == one
    assert not is_up()


def test_it_can_be_repeated() -> None:
    for _ in range(3):
        with world() as one:
            check(one)
        assert not is_up()


def test_a_nested_world_is_the_outer_one_and_leaves_it_up() -> None:
    with world() as outer:
        with world() as inner:
            assert inner == outer
            with world() as innermost:
                assert innermost == outer
        check(outer)
    assert not is_up()


def test_an_error_inside_takes_it_down() -> None:
    with pytest.raises(RuntimeError, match="mine"), world():
        raise RuntimeError("mine")
    assert not is_up()
    with world() as one:
        check(one)


def test_an_error_in_a_nested_world_leaves_the_outer_one() -> None:
    with world() as outer:
        with pytest.raises(RuntimeError, match="mine"), world():
            raise RuntimeError("mine")
        check(outer)
    assert not is_up()


def test_sizes_that_do_not_fit_one_process_leave_nothing_up() -> None:
    with pytest.raises(RuntimeError), world(tensor_parallel=2):
        pass
    assert not is_up()


def test_the_seed_is_megatrons() -> None:
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    drawn = []
    for seed in (3, 3, 4):
        with world(seed=seed), get_cuda_rng_tracker().fork():
            drawn.append(torch.rand(4, device=current_world().device).tolist())
    assert drawn[0] == drawn[1] != drawn[2]


def test_torchruns_environment_is_read_without_process_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    assert torchrun_environment() == (0, 1)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert torchrun_environment() == (3, 8)
    assert not is_up()


def test_under_torchruns_environment_its_rendezvous_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    assert os.environ["WORLD_SIZE"] == "1"
    with world() as one:
        check(one)
    assert not is_up()
