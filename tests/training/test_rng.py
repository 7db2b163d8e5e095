"""Random numbers go on where a checkpoint left them, the device's and megatron's streams too."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch import nn

from megabyte_distill.parallel.process_groups import World
from megabyte_distill.parallel.process_groups import world as process_groups
from megabyte_distill.training import rng
from megabyte_distill.training.checkpoint import load_training_state, save_checkpoint


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with process_groups(seed=5) as current:
        yield current


def draw(device: torch.device) -> list[list[float]]:
    """From the CPU, the device, and megatron's stream for tensor-parallel ranks."""
    drawn = [torch.rand(3), torch.rand(3, device=device)]
    with get_cuda_rng_tracker().fork():
        drawn.append(torch.rand(3, device=device))
    return [values.tolist() for values in drawn]


def save(folder: Path) -> Path:
    return save_checkpoint(folder, 1, nn.Linear(2, 2), optimizer=None, loop={}, texts={})


def load(checkpoint: Path) -> str | None:
    return load_training_state(checkpoint, nn.Linear(2, 2), None, with_rng=True)


def test_all_streams_go_on_from_a_checkpoint(world: World, tmp_path: Path) -> None:
    draw(world.device)
    path = save(tmp_path)
    expected = draw(world.device)
    assert draw(world.device) != expected
    assert load(path) is None
    assert draw(world.device) == expected


def test_a_state_is_a_copy_that_drawing_does_not_move(world: World) -> None:
    state = rng.rng_state()
    first = draw(world.device)
    rng.set_rng_state(state)
    assert draw(world.device) == first
    rng.set_rng_state(state)
    assert draw(world.device) == first


def test_at_other_sizes_the_common_streams_go_on_and_it_is_said(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path)
    expected = draw(world.device)
    with monkeypatch.context() as patched:
        patched.setattr(rng, "_sizes", lambda: (1, 2, 1))
        assert "1 × 1 × 1 and start anew at 1 × 2 × 1" in (load(path) or "")
    drawn = draw(world.device)
    assert drawn[:2] == expected[:2] if world.device.type == "cuda" else drawn[0] == expected[0]
    assert drawn[2] != expected[2]


def test_the_states_of_a_checkpoint_of_an_earlier_version_are_taken_up(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(rng, "sharded_rng_state", torch.get_rng_state)
        path = save(tmp_path)
    expected = torch.rand(3)
    assert load(path) is None
    assert torch.equal(torch.rand(3), expected)
