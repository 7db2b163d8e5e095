"""What is not finite is found where it begins: the module, the rank, the micro-batch, the byte, the document."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megabyte_distill.config.stage import StageConfig
from megabyte_distill.conversion.model_config import ModelConfig
from megabyte_distill.curriculum.stages import STAGES
from megabyte_distill.data.chunk_merging import merge_row
from megabyte_distill.data.mock import MockRowStream
from megabyte_distill.data.packing import PackedRow
from megabyte_distill.model.student import set_trainable
from megabyte_distill.objectives.objective import Objective
from megabyte_distill.parallel.pipeline import virtual_stages
from megabyte_distill.parallel.process_groups import World, regroup
from megabyte_distill.parallel.process_groups import world as process_groups
from megabyte_distill.runs import build_model
from megabyte_distill.training.nonfinite import find_nonfinite
from megabyte_distill.training.optimizer import TrainerModel, wrap_for_training
from megabyte_distill.training.rows import MicroBatches
from megabyte_distill.training.step import train_step
from tests.distributed.ranks import run_ranks
from tests.tiny_student import BACKBONE, BYTE_SIDE, random_rows
from tests.training.small_step import small_trainer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS = [row.to(DEVICE) for row in random_rows(4)]


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with process_groups() as current:
        yield current


def place(micro_batch: int, byte: int) -> str:
    return f"<{micro_batch}, {byte}>"


def found(trained: TrainerModel, objective: Objective, rows: list[PackedRow], world: World) -> str:
    """After an update that must have been skipped."""
    assert train_step(trained, objective, rows, 0, world).skipped
    return find_nonfinite(trained, objective, rows, world, place)


def multiply(module: nn.Module, factor: float, when: Callable[[Tensor], bool] = lambda output: True) -> None:
    """Have a module's output multiplied where ``when`` says so: a kernel that overflows now and then."""

    def hook(_: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output * factor if when(output) else output

    module.register_forward_hook(hook)


def test_a_poisoned_weight_is_named_as_such(world: World) -> None:
    trained, objective = small_trainer(world)
    name = next(name for name, _ in trained.module.named_parameters() if name.startswith("router."))
    with torch.no_grad():
        trained.module.get_parameter(name).view(-1)[3] = math.nan
    said = found(trained, objective, ROWS[:1], world)
    assert f"on rank 0: the weight {name} itself has 1 NaN of" in said


NORM = "byte_encoder.mixer.blocks.0.norm"


def test_a_poisoned_input_is_found_at_its_byte_and_micro_batch(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """One byte value is embedded as NaN; only the third row has it. No module makes the embedding."""
    from megabyte_distill.model import byte_encoder

    others = set(ROWS[0].byte_ids.tolist()) | set(ROWS[1].byte_ids.tolist())
    byte = next(at for at, value in enumerate(ROWS[2].byte_ids.tolist()) if value not in others)
    embed = byte_encoder.byte_embedding

    def poisoned(byte_ids: Tensor, weight: Tensor) -> Tensor:
        return embed(byte_ids, weight).masked_fill((byte_ids == ROWS[2].byte_ids[byte])[:, None], math.nan)

    monkeypatch.setattr(byte_encoder, "byte_embedding", poisoned)
    said = found(*small_trainer(world), ROWS[:3], world)
    assert said.startswith("on rank 0, micro-batch 2: the input of byte_encoder.mixer has "), said
    assert said.endswith(f"first at byte {byte} of it: <2, {byte}>"), said


def test_a_kernel_that_overflows_is_found_with_how_much_of_it(world: World) -> None:
    trained, objective = small_trainer(world)
    calls = 0

    def hook(_: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        bad = torch.zeros_like(output, dtype=torch.bool)
        bad[9:11] = calls % 2 == 0  # of two micro-batches the second
        return output.masked_fill(bad, math.inf)

    trained.module.get_submodule(NORM).register_forward_hook(hook)
    said = found(trained, objective, ROWS[:2], world)
    assert said == (
        f"on rank 0, micro-batch 1: the output of {NORM} has 24 infinite of 768 values, first at byte 9 of it: <1, 9>"
    )


@pytest.mark.parametrize("limit", [None, 2.5])
def test_a_chunk_is_told_by_the_byte_that_ends_it(world: World, limit: float | None) -> None:
    trained, objective = small_trainer(world)
    name = "backbone.decoder.layers.1.pre_mlp_layernorm"

    def hook(_: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output.index_fill(0, torch.tensor([2], device=output.device), math.nan)

    trained.module.get_submodule(name).register_forward_hook(hook)
    row = merge_row(ROWS[0], limit)
    said = found(trained, objective, [row], world)
    byte = int(row.bits.nonzero()[2, 0])
    assert f"the output of {name} has 32 NaN of" in said
    assert f"first at chunk 2, which by gold boundaries ends at byte {byte} of it: <0, {byte}>" in said


class Break(torch.autograd.Function):
    """Identity; its backward makes NaN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * math.nan


def test_a_gradient_is_found_where_it_arrives(world: World) -> None:
    """The forward pass is finite; what is broken stands behind the last norm of the encoder's first block."""
    trained, objective = small_trainer(world)
    name = "byte_encoder.mixer.blocks.0.ffn_norm"
    trained.module.get_submodule(name).register_forward_hook(lambda module, inputs, output: Break.apply(output))
    said = found(trained, objective, ROWS[:1], world)
    weight = trained.module.get_submodule(name).weight.numel()
    assert said.startswith(f"on rank 0, micro-batch 0: the gradient of {name}.weight has {weight} NaN of {weight}"), (
        said
    )


def test_a_loss_that_only_becomes_infinite_in_the_objective_is_named(world: World) -> None:
    trained, objective = small_trainer(world)
    losses = objective.losses

    def infinite(*args: Any, **kwargs: Any) -> dict[str, Tensor]:
        return {name: loss * (math.inf if name == "byte ce" else 1.0) for name, loss in losses(*args, **kwargs).items()}

    objective.losses = infinite  # type: ignore[method-assign]
    said = found(trained, objective, ROWS[:1], world)
    assert said == "on rank 0, micro-batch 0: the loss 'byte ce' has 1 infinite of 1 values"


def test_what_does_not_happen_again_is_said_to_be_transient(world: World) -> None:
    trained, objective = small_trainer(world)
    hits = [True]
    multiply(trained.module.get_submodule(NORM), math.nan, lambda output: bool(hits and hits.pop()))
    assert "a second pass over the same rows is finite" in found(trained, objective, ROWS[:1], world)


def test_afterwards_nothing_is_left_of_the_search(world: World) -> None:
    trained, objective = small_trainer(world)
    other, _ = small_trainer(world)
    find_nonfinite(trained, objective, ROWS[:2], world, place)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in trained.module.byte_encoder.modules())
    for one in (trained, other):
        report = train_step(one, objective, ROWS[:2], 0, world)
        assert not report.skipped
    for one, two in zip(trained.module.parameters(), other.module.parameters(), strict=True):
        assert torch.equal(one, two)


def on_one_rank(world: World) -> str:
    trained, objective = small_trainer(world)
    if world.rank == 1:
        multiply(trained.module.get_submodule(NORM), math.inf)
    return found(trained, objective, ROWS[2 * world.rank : 2 * world.rank + 2], world)


def on_a_virtual_stage(world: World) -> str:
    torch.manual_seed(2)
    model = build_model(ModelConfig(backbone=replace(BACKBONE, num_layers=4), byte_side=BYTE_SIDE)).to(world.device)
    parts, config, stage = virtual_stages(model), StageConfig(), STAGES["2a"]
    for part in parts:
        set_trainable(part, stage.trains(config, BACKBONE))
    trained = wrap_for_training(model, parts[0].config, config)
    if world.rank == 0:  # the third of four stages
        multiply(parts[1].backbone.decoder.layers[0].pre_mlp_layernorm, math.nan)
    return found(trained, stage.objective(config, None, None), ROWS[:2], world)


def answers(world: World) -> list[str]:
    copies = on_one_rank(world)
    return [copies, on_a_virtual_stage(regroup(tensor_parallel=1, pipeline_parallel=2, virtual_stages=2))]


def test_the_rank_and_its_virtual_stage_are_named_on_all_ranks(tmp_path: Path) -> None:
    both = run_ranks(tmp_path, "tests.training.test_nonfinite", "answers")
    assert both[0] == both[1]
    copies, stages = both[0]
    assert copies.startswith("on rank 1, micro-batch 0: the output of byte_encoder.")
    where = "the output of backbone.decoder.layers.0.pre_mlp_layernorm of pipeline stage 2 has "
    assert stages.startswith(f"on rank 0, micro-batch 0: {where}"), stages


def test_a_byte_is_told_by_row_document_and_place(world: World) -> None:
    config = StageConfig(seq_length=64, chunk_bucket=8, micro_batch_size=2, global_batch_size=8)
    stream = MockRowStream(90, row_bytes=64, chunk_bucket=8, seed=3)
    second = replace(world, data_parallel_rank=1, data_parallel_size=2)
    source = MicroBatches(stream, config, second)
    batches = source.next_micro_batches(0)
    documents = stream.datasets[0]
    for micro_batch, batch in enumerate(batches):
        for byte in range(128):
            said = source.locate(micro_batch, byte)
            row = 2 * (2 * micro_batch + byte // 64) + 1
            assert said.startswith(f"row {row} of the update, "), said
            value = int(batch.byte_ids[byte])
            if value == 255:
                assert said.endswith("unused bytes behind its text")
            elif value == 254:
                assert said.endswith("its BOS")
            else:
                words = said.replace(",", "").split()
                document, at = int(words[words.index("document") + 1]), int(words[-3])
                assert int(documents.byte_ids(document, at, at + 1)[0]) == value
