"""Each invariant, broken on purpose on one of two ranks, is named on both; an untouched model passes."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from megabyte_distill.parallel.process_groups import World
from megabyte_distill.training.failures import TrainingFailure
from megabyte_distill.training.fingerprints import fingerprint
from megabyte_distill.training.invariants import Invariants
from tests.distributed.ranks import run_ranks
from tests.pretrain.job import SCRIPT, Job, run_as_ranks

HERE = "tests.training.test_invariants"


class Model(nn.Module):
    """A trained part, a frozen one, and a part that tensor parallelism cuts."""

    def __init__(self, rank: int, device: torch.device) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.trained = nn.Linear(3, 3)
        self.frozen = nn.Linear(3, 2).requires_grad_(False)
        self.cut = nn.Linear(3, 2, bias=False)
        with torch.no_grad():
            self.cut.weight.add_(rank)
        self.to(device)
        self.cut.weight.tensor_model_parallel = True  # type: ignore[assignment]
        for parameter in self.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None


def message(world: World, broken: Callable[[Model], None], *, cut_differs: bool) -> str | None:
    """What the check says after rank 1 did something to its model; None where it is content."""
    model = Model(world.rank if cut_differs else 0, world.device)
    invariants = Invariants(model, world, [lambda: ["boundaries differ"] if hasattr(model, "odd") else []])
    if world.rank == 1:
        with torch.no_grad():
            broken(model)
    try:
        invariants.check("stage x iteration 7")
    except TrainingFailure as failure:
        return str(failure)
    return None


def _nothing(model: Model) -> None: ...


def _last_bit(model: Model) -> None:
    bits = model.trained.weight.view(torch.int32)
    bits[0, 0] ^= 1


def _frozen(model: Model) -> None:
    model.frozen.bias[0] += 1.0


def _swapped(model: Model) -> None:
    model.trained.bias.copy_(model.trained.bias.flip(0))


def _gradient(model: Model) -> None:
    assert model.trained.bias.grad is not None
    model.trained.bias.grad[1] = math.inf


def _further(model: Model) -> None:
    model.odd = True  # type: ignore[assignment]


CASES = {"nothing": _nothing, "bit": _last_bit, "frozen": _frozen, "swap": _swapped, "gradient": _gradient}


def data_parallel(world: World) -> dict[str, str | None]:
    return {name: message(world, case, cut_differs=False) for name, case in (*CASES.items(), ("further", _further))}


def tensor_parallel(world: World) -> dict[str, str | None]:
    return {name: message(world, case, cut_differs=True) for name, case in CASES.items()}


@pytest.fixture(scope="module", params=["data_parallel", "tensor_parallel"])
def answers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    size = 2 if request.param == "tensor_parallel" else 1
    both = run_ranks(tmp_path_factory.mktemp("ranks"), HERE, request.param, tensor_parallel=size)
    assert both[0] == both[1], "the ranks must end together"
    return {**both[0], "kind": request.param.replace("_", "-")}


def test_a_model_that_is_alike_passes(answers: dict[str, str | None]) -> None:
    assert answers["nothing"] is None


def test_a_weight_that_differs_in_one_bit_is_named_with_the_ranks(answers: dict[str, str | None]) -> None:
    said = answers["bit"] or ""
    assert said.startswith("stage x iteration 7: 1 broken invariants")
    assert f"trained.weight differs over {answers['kind']} ranks: 0 | 1" in said


def test_values_in_another_order_are_no_equal_values(answers: dict[str, str | None]) -> None:
    assert f"trained.bias differs over {answers['kind']} ranks: 0 | 1" in (answers["swap"] or "")


def test_a_frozen_weight_that_moved_is_named(answers: dict[str, str | None]) -> None:
    assert "frozen.bias is frozen and has changed on rank 1" in (answers["frozen"] or "")


def test_a_gradient_that_is_not_finite_on_one_rank_is_named(answers: dict[str, str | None]) -> None:
    said = answers["gradient"] or ""
    assert "the gradient of trained.bias is not finite on rank 1" in said and "1 broken" in said


def test_a_further_invariant_is_asked_and_reported(answers: dict[str, str | None]) -> None:
    if answers["kind"] == "data-parallel":
        assert "boundaries differ" in (answers["further"] or "")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8])
def test_a_fingerprint_tells_every_bit_and_every_place(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tensor = (torch.randn(3, 50) * 20).to(dtype)
    same = fingerprint(tensor)
    assert torch.equal(fingerprint(tensor.clone()), same)
    assert torch.equal(fingerprint(tensor.t().contiguous().t()), same), "the layout in memory is no bit of it"
    other = tensor.clone()
    other[2, 49] = -other[2, 49] + 1
    assert not torch.equal(fingerprint(other), same)
    assert not torch.equal(fingerprint(tensor.flip(1)), same)


def test_blocks_of_a_large_tensor_have_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    from megabyte_distill.training import fingerprints

    monkeypatch.setattr(fingerprints, "_BLOCK", 10)
    tensor = torch.arange(20.0)
    assert not torch.equal(fingerprint(tensor), fingerprint(tensor.roll(10)))


@pytest.mark.parametrize(
    "flags",
    [
        ("--tensor-model-parallel-size", "2", "--sequence-parallel", "--byte-mixer", "mamba2"),
        ("--use-distributed-optimizer", "--bf16", "--overlap-grad-reduce", "--overlap-param-gather"),
    ],
)
def test_real_stages_on_two_ranks_break_none(job: Job, tmp_path: Path, flags: tuple[str, ...]) -> None:
    more = (*flags, "--global-batch-size", "2", "--check-invariants", "1", "--stages", "1b,2a,2b", "--train-iters", "2")
    done = run_as_ranks(str(SCRIPT), *job.flags(tmp_path / "run", *more), processes=2)
    assert done.returncode == 0, done.stderr
