"""Transformer Engine's own layers on a GPU against megatron-core's: states, gradients, FP8, recomputation, training.

What can be tested without them is in test_engine_layers.py. Where there is a GPU with Transformer Engine::

    python -m pytest -ra tests/model/test_engine_gpu.py
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megabyte_distill import optional
from megabyte_distill.config.engine import EngineConfig, Fp8Format, Fp8Recipe, TransformerImpl
from megabyte_distill.config.model import BackboneConfig
from megabyte_distill.config.stage import LrDecayStyle, RecomputeGranularity, StageConfig
from megabyte_distill.conversion.teacher_folder import TeacherHolder
from megabyte_distill.curriculum.stages import STAGES
from megabyte_distill.model.backbone import Backbone, transformer_config
from megabyte_distill.model.engine_layers import requantize_weights
from megabyte_distill.model.student import Student, set_trainable
from megabyte_distill.parallel.process_groups import World
from megabyte_distill.pretrain.engine_limits import device_problems
from megabyte_distill.training.checkpoint import load_checkpoint, save_checkpoint, sharded_state_dict
from megabyte_distill.training.optimizer import wrap_for_training
from megabyte_distill.training.step import evaluate, train_step
from megabyte_distill.training.throughput import FlopCount
from tests.fp8_rounding import round_as_fp8
from tests.tiny_student import BACKBONE, BYTE_SIDE, enlarged, random_rows
from tests.tiny_student import FAMILIES as FIELDS

WHY = optional.engine_problem()
pytestmark = [
    pytest.mark.usefixtures("world"),
    pytest.mark.skipif(
        WHY is not None,
        reason=f"the package transformer_engine {WHY}; on a GPU with it: pytest -ra tests/model/test_engine_gpu.py",
    ),
]

LLAMA = replace(BACKBONE, hidden_size=128, ffn_hidden_size=256, num_attention_heads=4, num_query_groups=2, head_dim=64)
FAMILIES = {
    name: replace(
        LLAMA, **{**fields, "rope_scaling": None, "sliding_window": 48 if "sliding_window" in fields else None}
    )
    for name, fields in FIELDS.items()
}
OFFSETS = torch.tensor([0, 1, 20, 160, 250, 256], dtype=torch.int32)
"""256 positions, the last six of them a dummy segment."""
RECIPES = [recipe.value for recipe in Fp8Recipe]


def engine(recipe: str | None = None) -> dict[str, object]:
    config = EngineConfig(
        transformer_impl=TransformerImpl.TRANSFORMER_ENGINE,
        fp8_format=None if recipe is None else Fp8Format.HYBRID,
        fp8_recipe=Fp8Recipe(recipe or "tensorwise"),
    )
    return config.transformer_fields


def backbone_on(
    device: torch.device, config: BackboneConfig, dtype: torch.dtype = torch.bfloat16, **fields: object
) -> Backbone:
    return Backbone(config, transformer_config(config, **fields)).to(device, dtype)


def with_weights_of(source: Backbone, target: Backbone, folder: Path) -> Backbone:
    """Through a checkpoint, as between runs."""
    path = save_checkpoint(folder, 1, TeacherHolder(source), optimizer=None, loop={}, texts={})
    load_checkpoint(path, TeacherHolder(target))
    return target


def skip_unless_it_runs(recipe: str, world: World) -> None:
    found = list(device_problems(Fp8Recipe(recipe), torch.cuda.get_device_capability(world.device)))
    if found:
        pytest.skip(found[0])


def states_and_slopes(backbone: Backbone, x: Tensor, upstream: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(states, gradient of x) in fp32; without ``upstream`` the gradient of the states depends on the states."""
    x = x.detach().clone().requires_grad_()
    states = backbone(x, OFFSETS.to(x.device)).float()
    (states.sin() if upstream is None else states * upstream).sum().backward()
    assert x.grad is not None
    return states.detach().float(), x.grad.float()


def distance(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_is_as_near_to_fp32_as_the_local_layers(family: str, world: World, tmp_path: Path) -> None:
    config, device = FAMILIES[family], world.device
    exact = enlarged(backbone_on(device, config, torch.float32))
    local = with_weights_of(exact, backbone_on(device, config), tmp_path / "local")
    theirs = with_weights_of(exact, backbone_on(device, config, **engine()), tmp_path / "engine")
    x = torch.randn(256, config.hidden_size, device=device)
    expected = states_and_slopes(exact, x)
    of_local = [distance(a, b) for a, b in zip(states_and_slopes(local, x), expected, strict=True)]
    of_engine = [distance(a, b) for a, b in zip(states_and_slopes(theirs, x), expected, strict=True)]
    assert of_engine[0] <= 2 * of_local[0] + 1e-3 and of_engine[1] <= 3 * of_local[1] + 1e-3, (of_engine, of_local)
    names = [set(sharded_state_dict(TeacherHolder(model))) for model in (local, theirs)]
    keys = [{part.key for part in sharded_state_dict(TeacherHolder(model)).values()} for model in (local, theirs)]
    assert keys[0] == keys[1] and (names[0] == names[1]) == config.post_norm


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_fp8_errs_as_its_rounding_does(family: str, recipe: str, world: World, tmp_path: Path) -> None:
    """Against bf16, beside local layers that are rounded by hand: 0.28 for Llama's wide weights, 0.08 for OLMo's."""
    skip_unless_it_runs(recipe, world)
    config, device = FAMILIES[family], world.device
    plain = enlarged(backbone_on(device, config, **engine()))
    fp8 = with_weights_of(plain, backbone_on(device, config, **engine(recipe)), tmp_path / "fp8")
    by_hand = round_as_fp8(with_weights_of(plain, backbone_on(device, config), tmp_path / "local"))
    x, upstream = (torch.randn(256, config.hidden_size, device=device) for _ in range(2))
    expected = states_and_slopes(plain, x, upstream)
    for _ in range(3):  # the delayed recipe learns its factors
        requantize_weights(fp8)
        got = states_and_slopes(fp8, x, upstream)
    errors = [distance(a, b) for a, b in zip(got, expected, strict=True)]
    allowed = [1.5 * distance(a, b) for a, b in zip(states_and_slopes(by_hand, x, upstream), expected, strict=True)]
    assert 0 < errors[0] < allowed[0] and 0 < errors[1] < allowed[1], (errors, allowed)


@pytest.mark.parametrize("recipe", ["tensorwise", "delayed"])
@pytest.mark.parametrize("granularity", ["full", "selective"])
def test_recomputation_changes_nothing(recipe: str, granularity: str, world: World, tmp_path: Path) -> None:
    skip_unless_it_runs(recipe, world)
    again = StageConfig(recompute_granularity=RecomputeGranularity(granularity)).recompute_fields
    plain = enlarged(backbone_on(world.device, LLAMA, **engine(recipe)))
    other = with_weights_of(plain, backbone_on(world.device, LLAMA, **engine(recipe), **again), tmp_path)
    x = torch.randn(256, LLAMA.hidden_size, device=world.device)
    for expected, got in zip(states_and_slopes(plain, x), states_and_slopes(other, x), strict=True):
        assert distance(got, expected) < 1e-2


@pytest.mark.parametrize("recipe", [None, *RECIPES])
def test_a_student_learns_and_evaluates(recipe: str | None, world: World) -> None:
    if recipe is not None:
        skip_unless_it_runs(recipe, world)
    stage, config = STAGES["2b"], StageConfig(lr=1e-3, lr_decay_style=LrDecayStyle.CONSTANT)
    transformer = transformer_config(LLAMA, **engine(recipe))
    student = Student(replace(BYTE_SIDE, backbone_width=LLAMA.hidden_size), Backbone(LLAMA, transformer))
    student.to(world.device, torch.bfloat16)
    set_trainable(student, stage.trains(config, LLAMA))
    trained = wrap_for_training(student, student.config, config, bf16=True)
    objective = stage.objective(config, None, None)
    rows = [row.to(world.device) for row in random_rows(2, bucket=32)]
    reports = [train_step(trained, objective, rows, iteration, world) for iteration in range(20)]
    first, last = reports[0].sums["byte ce"][0], reports[-1].sums["byte ce"][0]
    assert last < first and not any(report.skipped for report in reports)
    held_out = evaluate(trained.module, objective, [rows], world)["byte ce"][0]
    # the evaluation sees the last update's weights: on what was trained on it is no worse than before that update
    assert held_out < last * 1.05


def test_operations_are_counted_as_of_the_local_layers(world: World) -> None:
    x, flops = torch.randn(256, LLAMA.hidden_size, device=world.device), []
    for fields in ({}, engine()):
        backbone = backbone_on(world.device, LLAMA, **fields)
        with FlopCount() as count:
            states_and_slopes(backbone, x)
        flops.append(count.flops)
    assert flops[1] == pytest.approx(flops[0], rel=0.01)


def test_the_optimizer_is_the_engines(world: World) -> None:
    backbone = backbone_on(world.device, LLAMA, **engine())
    trained = wrap_for_training(backbone, backbone.config, StageConfig(), bf16=True)
    parts = getattr(trained.optimizer, "chained_optimizers", [trained.optimizer])
    assert {type(part.optimizer).__module__.split(".")[0] for part in parts} == {"transformer_engine"}
