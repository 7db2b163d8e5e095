"""One update: fetch, count, forward and backward, clip, step. Linear, and the same for every stage."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from megabyte_distill.data.packing import PackedRow
from megabyte_distill.objectives.objective import Objective
from megabyte_distill.parallel.positions import Position
from megabyte_distill.parallel.process_groups import World
from megabyte_distill.training.optimizer import TrainerModel


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """What an update did. ``sums`` are global: name → (sum, count)."""

    sums: dict[str, tuple[float, float]]
    grad_norm: float
    learning_rate: float
    skipped: bool
    """True where a loss or the gradient was NaN or infinite; the weights are as they were."""


def global_counts(counts: list[dict[str, int]], world: World) -> dict[str, float]:
    """Terms of each loss over all micro-batches (one entry each) and data-parallel ranks."""
    names = sorted(counts[0])
    totals = {name: float(sum(of_row[name] for of_row in counts)) for name in names}
    values = torch.tensor([totals[name] for name in names], dtype=torch.float64, device=world.device)
    dist.all_reduce(values, group=world.data_parallel_group)
    return dict(zip(names, values.tolist(), strict=True))


def reduce_sums(reports: list[dict[str, Tensor]], world: World) -> dict[str, tuple[float, float]]:
    """Add up (sum, count) pairs over micro-batches and data-parallel ranks."""
    names = sorted({name for report in reports for name in report})
    stacked = torch.stack([torch.stack([r[name].double() for r in reports if name in r]).sum(0) for name in names])
    dist.all_reduce(stacked, group=world.data_parallel_group)
    return {name: (total, count) for name, (total, count) in zip(names, stacked.tolist(), strict=True)}


def _report(objective: Objective, losses: dict[str, Tensor], counts: dict[str, int]) -> dict[str, Tensor]:
    pairs: dict[str, tuple[Tensor, Tensor | int]] = {n: (loss.detach(), counts[n]) for n, loss in losses.items()}
    pairs.update(objective.measures())
    return {
        name: torch.stack([total.detach().double(), torch.as_tensor(count, dtype=torch.float64, device=total.device)])
        for name, (total, count) in pairs.items()
    }


def forward_backward(
    model: nn.Module,
    objective: Objective,
    rows: list[PackedRow],
    counts: list[dict[str, int]],
    totals: dict[str, float],
    position: Position,
) -> list[dict[str, Tensor]]:
    """Run megatron's schedule over the micro-batches; gradients of Σ weight · sum / global count are accumulated.

    ``counts``: terms of each row's losses; ``totals``: over all rows and ranks.
    """

    def forward_step(iterator, module):  # type: ignore[no-untyped-def]
        number, (row, terms) = next(iterator)
        position.at("forward", number)

        def loss_of(losses: dict[str, Tensor]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            total = sum((objective.weights[name] / max(totals[name], 1.0)) * loss for name, loss in losses.items())
            position.at("backward", number)
            return total, torch.ones((), dtype=torch.int), _report(objective, losses, terms)  # type: ignore[return-value]

        return objective.losses(module, row), loss_of

    return get_forward_backward_func()(  # type: ignore[no-any-return]
        forward_step_func=forward_step,
        data_iterator=enumerate(zip(rows, counts, strict=True)),
        model=[model],
        num_microbatches=len(rows),
        seq_length=1,
        micro_batch_size=1,
        forward_only=False,
    )


@dataclass(frozen=True, slots=True)
class Gradients:
    """What a forward and backward pass over an update's rows gave; the gradients themselves lie in the optimizer."""

    sums: dict[str, tuple[float, float]]
    norm: float

    @property
    def is_finite(self) -> bool:
        """False where a loss or the gradient is NaN or infinite."""
        return math.isfinite(self.norm) and all(math.isfinite(total) for total, _ in self.sums.values())


def make_gradients(
    trained: TrainerModel,
    objective: Objective,
    rows: list[PackedRow],
    world: World,
    totals: dict[str, float] | None = None,
) -> Gradients:
    """Gradients of this rank's micro-batches, reduced over ranks, in place of those of any pass before.

    ``totals``: what the losses are divided by, where ``rows`` are only a part of an update.
    """
    counts = [objective.counts(row) for row in rows]
    trained.position.at("count")
    totals = totals or global_counts(counts, world)
    trained.ddp.zero_grad_buffer()
    trained.optimizer.zero_grad()
    reports = forward_backward(trained.ddp, objective, rows, counts, totals, trained.position)
    sums = reduce_sums(reports, world)
    trained.optimizer.prepare_grads()
    return Gradients(sums, float(trained.optimizer.get_grad_norm()))


def train_step(
    trained: TrainerModel,
    objective: Objective,
    rows: list[PackedRow],
    iteration: int,
    world: World,
    *,
    inspect: Callable[[Gradients], None] | None = None,
) -> StepReport:
    """One update from this rank's micro-batches; a non-finite gradient leaves the weights as they are (skipped).

    ``inspect``: called when the gradients are there and nothing was updated yet.
    """
    learning_rate = trained.set_learning_rate(iteration)
    gradients = make_gradients(trained, objective, rows, world)
    if inspect is not None:
        inspect(gradients)
    trained.position.at("step")
    if gradients.is_finite:
        trained.optimizer.step()
    return StepReport(
        sums=gradients.sums,
        grad_norm=gradients.norm,
        learning_rate=learning_rate,
        skipped=not gradients.is_finite,
    )


@torch.no_grad()
def evaluate(
    model: nn.Module, objective: Objective, batches: list[list[PackedRow]], world: World
) -> dict[str, tuple[float, float]]:
    """Global (sum, count) of every loss and measure over held-out rows, weights untouched."""
    if not batches:
        return {}
    reports: list[dict[str, Tensor]] = []
    training = model.training
    model.eval()
    for rows in batches:
        for row in rows:
            losses = objective.losses(model, row)
            reports.append(_report(objective, losses, objective.counts(row)))
    model.train(training)
    return reduce_sums(reports, world)
