"""megatron's DDP and optimizer, on a CPU, do what torch's AdamW does."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megabyte_distill.config.stage import LrDecayStyle, StageConfig
from megabyte_distill.curriculum.stages import STAGES
from megabyte_distill.model.student import set_trainable
from megabyte_distill.objectives.token_ce import TokenCrossEntropy
from megabyte_distill.parallel.process_groups import World
from megabyte_distill.training.optimizer import wrap_for_training
from megabyte_distill.training.step import train_step
from tests.tiny_student import random_rows, tiny_backbone, tiny_student, world

__all__ = ["world"]

CONFIG = StageConfig(lr=1e-2, lr_decay_style=LrDecayStyle.CONSTANT, clip_grad=0.5)


def test_updates_equal_adamw_on_the_mean_over_all_tokens(world: World) -> None:
    backbone = tiny_backbone()
    plain = tiny_backbone()
    plain.load_state_dict(backbone.state_dict())
    trained = wrap_for_training(backbone, backbone.config, CONFIG)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    objective = TokenCrossEntropy()
    rows = random_rows(3)
    count = sum(objective.counts(row)["lm loss"] for row in rows)
    losses = []
    for iteration in range(4):
        report = train_step(trained, objective, rows, iteration, world)
        optimizer.zero_grad()
        loss = torch.stack([objective.losses(plain, row)["lm loss"] for row in rows]).sum() / count
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        optimizer.step()
        total, reported = report.sums["lm loss"]
        assert reported == count and total / count == pytest.approx(float(loss), rel=1e-5)
        assert report.grad_norm == pytest.approx(float(norm), rel=1e-4) and report.grad_norm > 0.5
        assert report.learning_rate == 1e-2 and not report.skipped
        losses.append(float(loss))
    assert losses == sorted(losses, reverse=True)
    for (name, ours), theirs in zip(backbone.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("distributed", [False, True])
@pytest.mark.parametrize("name", STAGES)
def test_a_stage_learns_its_row_and_touches_nothing_frozen(
    name: str, bf16: bool, distributed: bool, world: World
) -> None:
    student = tiny_student()
    if bf16:
        student.bfloat16()
    stage, config = STAGES[name], replace(CONFIG, backbone_lr=5e-3 if name in ("1b", "2b", "3a") else None)
    set_trainable(student, stage.trains(config, student.backbone.backbone_config))
    before = {key: value.clone() for key, value in student.named_parameters()}
    teacher = tiny_backbone().to(student.backbone.dtype).requires_grad_(False)
    trained = wrap_for_training(student, student.config, config, bf16=bf16, use_distributed_optimizer=distributed)
    objective, row = stage.objective(config, teacher, None), random_rows(1)[0]
    reports = [train_step(trained, objective, [row], iteration, world) for iteration in range(8)]
    first, last = (sum(total for total, _ in (r.sums[k] for k in objective.weights)) for r in (reports[0], reports[-1]))
    assert last < first and not any(report.skipped for report in reports)
    for key, parameter in student.named_parameters():
        assert torch.equal(parameter, before[key]) != parameter.requires_grad, key
        assert parameter.requires_grad == hasattr(parameter, "main_grad"), key


def test_a_gradient_that_is_not_finite_leaves_the_weights_alone(world: World) -> None:
    backbone = tiny_backbone()
    trained = wrap_for_training(backbone, backbone.config, CONFIG)
    before = {name: value.clone() for name, value in backbone.named_parameters()}

    class Broken(TokenCrossEntropy):
        def losses(self, model: torch.nn.Module, row: object, link: object = None) -> dict[str, torch.Tensor]:
            return {"lm loss": super().losses(model, row)["lm loss"] * torch.nan}  # type: ignore[arg-type]

    report = train_step(trained, Broken(), random_rows(1), 0, world)
    assert report.skipped
    assert all(torch.equal(value, before[name]) for name, value in backbone.named_parameters())
    assert not train_step(trained, TokenCrossEntropy(), random_rows(1), 1, world).skipped
    assert all(bool(value.isfinite().all()) for value in backbone.parameters())
