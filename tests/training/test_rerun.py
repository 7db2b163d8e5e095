"""A second pass with other bits is noticed and named; the check itself changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megabyte_distill.parallel.process_groups import World
from megabyte_distill.parallel.process_groups import world as process_groups
from megabyte_distill.training.rerun import Rerun
from megabyte_distill.training.step import train_step
from tests.distributed.ranks import run_ranks
from tests.pretrain.job import Job, assert_same_run
from tests.tiny_student import random_rows
from tests.training.small_step import small_trainer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS = [row.to(DEVICE) for row in random_rows(4)]
NORM = "byte_encoder.mixer.blocks.0.norm"


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with process_groups() as current:
        yield current


def drift(module: nn.Module) -> None:
    """Have a module's outputs differ from call to call."""
    factor = 1.0

    def hook(_: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        nonlocal factor
        factor += 1e-3
        return output * factor

    module.register_forward_hook(hook)


def checked(world: World, *, drifting: bool, rows: slice = slice(0, 2)) -> tuple[str, ...]:
    trained, objective = small_trainer(world)
    if drifting:
        drift(trained.module.get_submodule(NORM))
    rerun = Rerun(trained, objective, ROWS[rows], world)
    train_step(trained, objective, ROWS[rows], 0, world, inspect=rerun.compare)
    return rerun.differences


def test_the_cpu_is_deterministic(world: World) -> None:
    assert checked(world, drifting=False) == ()


def test_what_differs_is_named_with_both_values(world: World) -> None:
    said = "; ".join(checked(world, drifting=True))
    assert "gradient norm " in said and "byte ce " in said and "router bce " in said
    assert "on rank 0 the gradients of byte_encoder.embedding.weight, " in said


def test_one_gradient_that_differs_in_one_bit_is_found(world: World) -> None:
    trained, objective = small_trainer(world)
    rerun = Rerun(trained, objective, ROWS[:2], world)

    def flip(gradients: Any) -> None:
        gradient = trained.module.byte_decoder.head.weight.main_grad
        gradient.view(torch.int32)[0, 0] ^= 1
        rerun.compare(gradients)

    train_step(trained, objective, ROWS[:2], 0, world, inspect=flip)
    assert rerun.differences == ("on rank 0 the gradients of byte_decoder.head.weight",)


def on_one_rank(world: World) -> list[str]:
    return list(checked(world, drifting=world.rank == 1, rows=slice(2 * world.rank, 2 * world.rank + 2)))


def test_on_two_ranks_everybody_knows(tmp_path: Path) -> None:
    both = run_ranks(tmp_path, "tests.training.test_rerun", "on_one_rank")
    assert both[0] == both[1] and any("gradient norm" in text for text in both[0])


def test_a_checked_run_has_the_digits_of_an_unchecked_one(
    job: Job, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert job.run(tmp_path / "run", "--rerun-check", "2") == 0
    assert_same_run(tmp_path / "run", finished)
    printed = capsys.readouterr().out
    assert "not deterministic" not in printed
    assert printed.count("number of non-deterministic iterations: 0") == 20
