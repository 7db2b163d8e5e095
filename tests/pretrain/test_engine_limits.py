"""FP8 is refused before anything is built where the teacher's sizes or the GPU cannot run it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megabyte_distill.config import Settings, parse_arguments
from megabyte_distill.config.engine import Fp8Recipe
from megabyte_distill.pretrain.engine_limits import check_engine_limits, device_problems
from tests.tiny_student import BACKBONE

CPU = torch.device("cpu")
FP8 = "--transformer-impl transformer_engine --bf16 --fp8-format hybrid --dry-run --fp8-recipe"
ROUND = replace(BACKBONE, hidden_size=64, ffn_hidden_size=128, head_dim=16)


def settings_of(line: str, size: int = 1) -> Settings:
    return parse_arguments(["--mock-data", "--micro-batch-size", "1", *line.split()], world_size=size)


@pytest.mark.parametrize(
    ("recipe", "capability", "runs"),
    [
        ("delayed", (8, 0), False),
        ("delayed", (8, 9), True),
        ("tensorwise", (9, 0), True),
        ("blockwise", (8, 9), False),
        ("blockwise", (9, 0), True),
        ("mxfp8", (9, 0), False),
        ("mxfp8", (10, 0), True),
        ("mxfp8", (10, 3), True),
        ("mxfp8", (12, 0), False),
    ],
)
def test_a_recipe_needs_its_gpu(recipe: str, capability: tuple[int, int], runs: bool) -> None:
    found = list(device_problems(Fp8Recipe(recipe), capability))
    assert (not found) == runs
    if not runs:
        (problem,) = found
        assert f"this GPU has {capability[0]}.{capability[1]}" in problem
        instead = problem.split("runs: ")[1]
        assert instead == "none; leave --fp8-format out" or not any(
            list(device_problems(Fp8Recipe(name), capability)) for name in instead.split(", ")
        )


def test_a_cpu_runs_none_and_is_asked_only_where_fp8_is() -> None:
    check_engine_limits(settings_of(""), BACKBONE, CPU)
    with pytest.raises(ValueError, match="runs on GPUs alone, and there is none"):
        check_engine_limits(settings_of(f"{FP8} tensorwise"), ROUND, CPU)


def told(line: str, backbone: object = ROUND, size: int = 1) -> list[str]:
    with pytest.raises(ValueError) as caught:
        check_engine_limits(settings_of(line, size), backbone, CPU)  # type: ignore[arg-type]
    return [part for part in str(caught.value).split("; ") if "GPUs alone" not in part]


def test_widths_that_do_not_divide_are_named() -> None:
    assert told(f"{FP8} tensorwise") == []
    assert told(f"{FP8} mxfp8") == []
    (problem, _) = told(f"{FP8} tensorwise", replace(ROUND, ffn_hidden_size=120, hidden_size=72))
    assert "the hidden size (72), a rank's part of the MLP (120)" in problem and "multiples of 16" in problem
    (problem, _) = told(f"{FP8} mxfp8 --tensor-model-parallel-size 4", ROUND, 4)
    assert "a rank's heads (16)" in problem and "queries, keys and values (48)" in problem


def test_a_stage_cannot_keep_more_layers_than_it_has() -> None:
    line = f"{FP8} tensorwise --first-last-layers-bf16 --num-layers-at-start-in-bf16"
    assert told(f"{line} 2") == []
    (problem,) = told(f"{line} 3")
    assert problem == "--num-layers-at-start-in-bf16 3: a pipeline stage has 2 layers, give at most that"
    assert told(f"{line} 2 --pipeline-model-parallel-size 2", size=2) == [
        "--num-layers-at-start-in-bf16 2: a pipeline stage has 1 layers, give at most that"
    ]
