"""Each stage's first updates are the same however two or four ranks are cut: tensor, pipeline, sequence, data."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing

from megabyte_distill.parallel.process_groups import current_world, world
from tests.distributed.stage_cases import (
    CASES,
    LAYOUTS,
    MARGIN,
    SAVED_AGAIN,
    TRAINED,
    cases_of,
    run_all,
    write_starts,
    write_trained,
)
from tests.pretrain.job import run_as_ranks

TOLERANCE = 1e-5
SECOND_UPDATE = {"3a": 3e-5}
"""Of gradient norms behind Adam's first step, which is as large as the learning rate also where a gradient is rounding
alone: few bytes are marked in 3a, so that many are."""
CUT = {**LAYOUTS[2], **LAYOUTS[4]}
pytestmark = pytest.mark.timeout(900)
"""The first test of a world size waits for all of its cases."""


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints written by one rank; the others are cut out of them."""
    folder = tmp_path_factory.mktemp("start")
    with world():
        write_starts(folder)
        write_trained(folder / TRAINED, current_world())
    return folder


@pytest.fixture(scope="module")
def alone(start: Path) -> dict[str, Any]:
    with world():
        return run_all(start)


def of_ranks(start: Path, ranks: int, output: Path) -> dict[str, Any]:
    """Ranks are started once a world size and run everything."""
    program = Path(__file__).with_name("stage_cases.py")
    done = run_as_ranks(str(program), str(start), str(output), processes=ranks, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    results: dict[str, Any] = json.loads(output.read_text())
    return results


@pytest.fixture(scope="module")
def of_two(start: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return of_ranks(start, 2, tmp_path_factory.mktemp("two") / "figures.json")


@pytest.fixture(scope="module")
def of_four(start: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return of_ranks(start, 4, tmp_path_factory.mktemp("four") / "figures.json")


@pytest.fixture
def found(request: pytest.FixtureRequest, layout: str) -> dict[str, Any]:
    """The layout's figures by case."""
    of_all: dict[str, Any] = request.getfixturevalue("of_two" if layout in LAYOUTS[2] else "of_four")
    figures: dict[str, Any] = of_all[layout]
    return figures


def flat(value: Any, path: str = "") -> dict[str, float]:
    if isinstance(value, dict):
        return {k: v for key, inner in value.items() for k, v in flat(inner, f"{path}/{key}").items()}
    if isinstance(value, list):
        return {k: v for i, inner in enumerate(value) for k, v in flat(inner, f"{path}/{i}").items()}
    return {path: float(value)}


def tolerance(case: str, figure: str) -> float:
    """Relative."""
    return SECOND_UPDATE.get(case, TOLERANCE) if figure == "/grad_norms/1" else TOLERANCE


@pytest.mark.parametrize(
    ("layout", "case"), [(name, case) for name, layout in CUT.items() for case in cases_of(layout)]
)
def test_losses_and_gradient_norms_are_those_of_one_rank(
    found: dict[str, Any], alone: dict[str, Any], layout: str, case: str
) -> None:
    figures = ("losses", "grad_norms", "held out")
    ours = flat({name: found[case][name] for name in figures})
    one_rank = alone["one rank, bf16" if layout.endswith("bf16") else "one rank"]
    theirs = flat({name: one_rank[case][name] for name in figures})
    assert ours.keys() == theirs.keys() and len(theirs) > 6
    far = {
        name: (ours[name], value)
        for name, value in theirs.items()
        if not math.isclose(ours[name], value, rel_tol=tolerance(case, name), abs_tol=TOLERANCE)
    }
    assert not far, far


@pytest.mark.parametrize("case", [name for name in CASES if "router" in name])
def test_no_boundary_was_decided_by_rounding(alone: dict[str, Any], case: str) -> None:
    assert alone["one rank"][case]["margin"] > MARGIN


@pytest.mark.parametrize("layout", CUT)
def test_what_is_frozen_stays_bit_identical(found: dict[str, Any], layout: str) -> None:
    assert {case: result["changed"] for case, result in found.items()} == {case: [] for case in cases_of(CUT[layout])}


def tensors_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All that is no random number state."""
    stored = dist_checkpointing.load_plain_tensors(str(checkpoint))
    return {name: value for name, value in stored.items() if isinstance(value, torch.Tensor)}


@pytest.mark.usefixtures("of_two")
def test_a_checkpoint_passes_virtual_stages_unchanged(start: Path) -> None:
    """Weights, masters and moments: from one rank to PP2 x VPP2 and back, every bit."""
    with world():
        once, again = (tensors_of(start / name / "iter_0000001") for name in (TRAINED, SAVED_AGAIN))
    assert once.keys() == again.keys()
    moments = [name for name in once if "exp_avg" in name]
    assert sum("decoder.layers" in name for name in once) > 10 and len(moments) > 20
    assert not [name for name in once if not torch.equal(once[name], again[name])]


def test_the_losses_move(alone: dict[str, Any]) -> None:
    """Three updates that changed nothing would agree as well."""
    for result in alone["one rank"].values():
        name = next(iter(result["losses"][0]))
        assert result["losses"][0][name] != result["losses"][2][name] and min(result["grad_norms"]) > 0
