"""One update: fetch, count, forward and backward, clip, step. Linear, and the same for every stage."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from megabyte_distill.data.packing import PackedRow
from megabyte_distill.model.engine_layers import requantize_weights
from megabyte_distill.model.stage_link import StageLink
from megabyte_distill.objectives.objective import Objective
from megabyte_distill.parallel.pipeline import pipeline_size, shared_along_pipeline, virtual_stages
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


def reduce_sums(
    reports: list[dict[str, Tensor]], world: World, *, from_first: bool = False
) -> dict[str, tuple[float, float]]:
    """Add up (sum, count) pairs over micro-batches and data-parallel ranks; the same on every pipeline stage.

    ``from_first``: whether the first stage made the reports; else the last did.
    """
    sums: dict[str, tuple[float, float]] = {}
    if reports:
        names = sorted({name for report in reports for name in report})
        stacked = torch.stack([torch.stack([r[name].double() for r in reports if name in r]).sum(0) for name in names])
        dist.all_reduce(stacked, group=world.data_parallel_group)
        sums = {name: (total, count) for name, (total, count) in zip(names, stacked.tolist(), strict=True)}
    shared: dict[str, tuple[float, float]] = shared_along_pipeline(sums, from_first=from_first)
    return shared


def _report(objective: Objective, losses: dict[str, Tensor], counts: dict[str, int]) -> dict[str, Tensor]:
    pairs: dict[str, tuple[Tensor, Tensor | int]] = {n: (loss.detach(), counts[n]) for n, loss in losses.items()}
    pairs.update(objective.measures())
    return {
        name: torch.stack([total.detach().double(), torch.as_tensor(count, dtype=torch.float64, device=total.device)])
        for name, (total, count) in pairs.items()
    }


def run_schedule(
    parts: Sequence[nn.Module],
    objective: Objective,
    rows: list[PackedRow],
    counts: list[dict[str, int]],
    totals: Mapping[str, float],
    *,
    gradient_arrives: Sequence[bool] | None = None,
    forward_only: bool = False,
    position: Position | None = None,
) -> list[dict[str, Tensor]]:
    """Run megatron's schedule over the micro-batches; gradients of Σ weight · sum / global count are accumulated.

    Args:
        parts: this rank's parts of the model, one a virtual stage, wrapped for training or bare.
        counts: terms of each row's losses.
        totals: the same over all rows and ranks.
        gradient_arrives: of each part, whether anything trains on the pipeline stages before it (default: it does).
        forward_only: no gradients.
        position: told which micro-batch is under way.

    Returns:
        One report a micro-batch on the stage where the losses are complete, none on the others.
    """
    reports: list[dict[str, Tensor]] = []
    at = (position or Position()).at
    arrives = gradient_arrives or [True] * len(parts)

    def total_of(losses: dict[str, Tensor], terms: dict[str, int]) -> Tensor:
        reports.append(_report(objective, losses, terms))
        shares = [(objective.weights[name] / max(totals[name], 1.0)) * loss for name, loss in losses.items()]
        return torch.stack(shares).sum()

    def forward_step(iterator, module):  # type: ignore[no-untyped-def]
        number, (row, terms) = next(iterator)
        link = stage_link(module, arrives)
        at("forward", number)
        output = stage_output(module, objective, row, link, lambda losses: total_of(losses, terms))
        at("backward", number)
        return output, _already_a_loss

    for part in parts:
        requantize_weights(part)
    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[enumerate(zip(rows, counts, strict=True)) for _ in parts],
        model=list(parts),
        num_microbatches=len(rows),
        seq_length=1,
        micro_batch_size=1,
        forward_only=forward_only,
    )
    return reports


def stage_output(
    model: nn.Module,
    objective: Objective,
    row: PackedRow,
    link: StageLink,
    total_of: Callable[[dict[str, Tensor]], Tensor],
) -> Tensor | None:
    """A micro-batch on this pipeline stage: the total loss on the last one, what goes to the next on the others."""
    if link.is_whole or not objective.on_first_stage:
        losses = objective.losses(model, row, link)
        return link.closed(total_of(losses)) if link.is_last else link.sent
    total = total_of(objective.losses(model, row)) if link.is_first else link.receive_total()
    return link.closed(total) if link.is_last else link.pass_on(total)


def _already_a_loss(total: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """What megatron's schedules ask of a loss function."""
    return total, torch.ones((), dtype=torch.int, device=total.device), {}


def stage_link(module: nn.Module, gradient_arrives: Sequence[bool]) -> StageLink:
    """The link of one micro-batch at this stage, with what the schedule received for it.

    ``gradient_arrives``: as in :func:`run_schedule`.
    """
    if pipeline_size() == 1:
        return StageLink()
    student: Any = getattr(module, "module", module)
    config = student.config
    return StageLink(
        is_first=student.pre_process,
        is_last=student.post_process,
        received=student.take_input(),
        gradient_arrives=gradient_arrives[student.vp_stage],
        dtype=config.pipeline_dtype,
        cut=config.tensor_model_parallel_size if config.sequence_parallel else 1,
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
    trained.zero_grad_buffers()
    trained.optimizer.zero_grad()
    reports = run_schedule(
        trained.parts,
        objective,
        rows,
        counts,
        totals,
        gradient_arrives=trained.gradient_arrives,
        position=trained.position,
    )
    sums = reduce_sums(reports, world, from_first=objective.on_first_stage)
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
    """Global (sum, count) of every loss and measure over held-out rows, weights untouched.

    Under --overlap-param-gather the weights must be gathered (``TrainerModel.gather_parameters``).
    """
    if not batches:
        return {}
    reports: list[dict[str, Tensor]] = []
    training = model.training
    model.eval()
    for rows in batches:
        counts = [objective.counts(row) for row in rows]
        totals = dict.fromkeys(objective.weights, 1.0)
        reports += run_schedule(virtual_stages(model), objective, rows, counts, totals, forward_only=True)
    model.train(training)
    return reduce_sums(reports, world, from_first=objective.on_first_stage)
