"""The loop: updates until the stage, the time or somebody's patience ends; between them evaluation, log, checkpoint."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

from megabyte_distill.config.stage import StageConfig
from megabyte_distill.config.training import RunConfig
from megabyte_distill.data.packing import PackedRow
from megabyte_distill.objectives.objective import Objective
from megabyte_distill.parallel.process_groups import World
from megabyte_distill.training.checkpoint import load_training_state, read_loop_state
from megabyte_distill.training.failures import TrainingFailure
from megabyte_distill.training.invariants import Invariants
from megabyte_distill.training.logging import MetricWriter, log_line, say
from megabyte_distill.training.nonfinite import find_nonfinite
from megabyte_distill.training.optimizer import TrainerModel, trainable_parameters
from megabyte_distill.training.rerun import Rerun
from megabyte_distill.training.saving import Saver
from megabyte_distill.training.signals import StopRequest
from megabyte_distill.training.step import StepReport, evaluate, train_step
from megabyte_distill.training.throughput import FlopCount


class StopReason(str, Enum):
    """Why :meth:`Loop.run` came back."""

    DONE = "done"
    SIGNAL = "signal"
    DURATION = "duration"
    INTERVAL = "interval"


class RowSource(Protocol):
    """Where micro-batches come from; the same order whatever the number of ranks."""

    chunk_limit: float | None
    """What the last update's tokens were merged with."""

    def next_micro_batches(self, iteration: int) -> list[PackedRow]:
        """This rank's micro-batches of the next update, behind ``iteration`` others of the stage."""

    def describe_last(self) -> str:
        """The documents of the last update, for messages."""

    def locate(self, micro_batch: int, byte: int) -> str:
        """Where a byte of one of its micro-batches comes from, for messages."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass
class Progress:
    """What the loop counts; all of it is in the checkpoint."""

    iteration: int = 0
    consumed_rows: int = 0
    consumed_bytes: int = 0
    skipped: int = 0
    nan_iterations: int = 0
    nan_in_a_row: int = 0
    nondeterministic: int = 0
    """Updates of which a second pass gave other bits, of those that were checked."""
    seconds: float = 0.0


@dataclass
class _Window:
    """Sums since the last log line."""

    sums: dict[str, tuple[float, float]] = field(default_factory=dict)
    updates: int = 0
    started: float = field(default_factory=time.perf_counter)

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> _Window:
        """A window that was open when a checkpoint was written."""
        sums = {name: (total, count) for name, (total, count) in state["sums"].items()}
        return cls(sums=sums, updates=state["updates"], started=time.perf_counter() - state["seconds"])

    def state(self) -> dict[str, Any]:
        return {"sums": self.sums, "updates": self.updates, "seconds": time.perf_counter() - self.started}

    def add(self, report: StepReport) -> None:
        for name, (total, count) in report.sums.items():
            before = self.sums.get(name, (0.0, 0.0))
            self.sums[name] = (before[0] + total, before[1] + count)
        self.updates += 1

    def averages(self) -> dict[str, float]:
        return averages(self.sums)


def averages(sums: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """(sum, count) pairs as means; what nothing was counted of (rows without an answer) has no figure."""
    return {name: total / count for name, (total, count) in sums.items() if count}


@dataclass(kw_only=True)
class Loop:
    """One stage's training, from wherever its checkpoint left off to its last update."""

    stage: str
    trained: TrainerModel
    objective: Objective
    rows: RowSource
    config: StageConfig
    run_config: RunConfig
    world: World
    saver: Saver
    writer: MetricWriter
    stop: StopRequest
    deadline: float = math.inf
    """time.monotonic() at which --exit-duration-in-mins is over."""
    extra_state: Mapping[str, Any] = field(default_factory=dict)
    """Written into each checkpoint's state: hashes of what it was made from."""
    valid_rows: Callable[[int], list[list[PackedRow]]] = lambda iteration: []
    """Held-out batches behind so many updates."""
    invariants: Invariants | None = None
    """Checked every ``check_invariants`` updates."""
    progress: Progress = field(default_factory=Progress)
    _window: _Window = field(default_factory=_Window)
    _flops: float | None = None
    """Of one update, on the average rank; counted on this process's first and wherever chunks become longer."""
    _counted_at: float | None = None
    """What tokens were merged with there."""

    def resume(self, checkpoint: Path, *, with_optimizer: bool = True, with_rng: bool = True) -> None:
        """Continue from a checkpoint of this stage: optimizer, counters and position in the data.

        The model has the checkpoint's weights already: the optimizer's masters were made from them.
        """
        if with_optimizer:
            self._check_optimizer(checkpoint)
        optimizer = self.trained if with_optimizer else None
        inexact = load_training_state(checkpoint, self.trained.module, optimizer, with_rng=with_rng)
        if inexact and self.world.is_main:
            say(f" warning: {inexact}")
        state = read_loop_state(checkpoint)
        self.progress = Progress(**state["progress"])
        self._window = _Window.from_state(state["window"]) if "window" in state else _Window()
        self.rows.load_state_dict(state["rows"])

    def _check_optimizer(self, checkpoint: Path) -> None:
        """ValueError where the checkpoint's optimizer cannot be taken up exactly."""
        flag, here = "--use-distributed-optimizer", self.trained.is_distributed
        was = bool(read_loop_state(checkpoint).get("distributed_optimizer", here))
        if was != here:
            words = ("with", "without") if was else ("without", "with")
            raise ValueError(
                f"{checkpoint} was saved {words[0]} {flag}, this run is started {words[1]} it, and the two save other "
                f"states; start it {words[0]} {flag}, or begin with a fresh optimizer: --no-load-optim"
            )

    def run(self) -> StopReason:
        """Train; on return the state is saved, whatever the reason.

        Where training fails on all ranks alike, a save that is under way is finished first. A failure of one rank alone
        leaves it unfinished, and the checkpoint before is the latest.
        """
        self.trained.module.train()
        window = self._window
        if not window.updates:
            window.started = time.perf_counter()
        if self.invariants is not None:
            self.invariants.check(f"stage {self.stage} before its first update here", gradients=False)
        try:
            reason = self._updates(window)
        except Exception as failure:
            if self.world.size == 1 or isinstance(failure, TrainingFailure):
                self.saver.finish()
            raise
        self.saver.finish()
        return reason

    def _updates(self, window: _Window) -> StopReason:
        while self.progress.iteration < self.config.train_iters:
            report = self._update(window)
            self._log(window, report)
            self._check_invariants(report)
            self._evaluate_if_due()
            reason, all_written = self._agree()
            if all_written:
                self.saver.finish()
            if reason is not None:
                self.save()
                return reason
            if self._is_save_due():
                self.save()
        return StopReason.DONE

    def _is_save_due(self) -> bool:
        iteration, interval = self.progress.iteration, self.config.save_interval
        return iteration == self.config.train_iters or bool(interval and iteration % interval == 0)

    def _update(self, window: _Window) -> StepReport:
        started = time.perf_counter()
        self.trained.position.begin(self.stage, self.progress.iteration + 1, "data")
        micro_batches = self.rows.next_micro_batches(self.progress.iteration)
        report = self._step(micro_batches)
        progress = self.progress
        progress.iteration += 1
        progress.consumed_rows += self.config.global_batch_size
        progress.consumed_bytes += self.config.bytes_per_update
        progress.seconds += time.perf_counter() - started
        progress.skipped += report.skipped
        progress.nan_iterations += report.skipped
        progress.nan_in_a_row = progress.nan_in_a_row + 1 if report.skipped else 0
        origin = self._explain(micro_batches) if report.skipped else ""
        window.add(report)
        if progress.nan_in_a_row >= self.run_config.max_nan_iterations:
            self._log(window, report, force=True)
            raise TrainingFailure(
                f"stage {self.stage}: {progress.nan_in_a_row} updates in a row without a finite loss and gradient, "
                f"the last at iteration {progress.iteration} "
                f"({ {n: t for n, (t, _) in report.sums.items()} }, gradient norm {report.grad_norm}): {origin}; "
                f"its batch: {self.rows.describe_last()}. No update was made with them, and the last "
                "checkpoint is from before; lower --lr, check the data, or raise --max-nan-iterations"
            )
        return report

    def _step(self, micro_batches: list[PackedRow]) -> StepReport:
        """One update, every ``rerun_check`` updates after a first pass whose result it must have."""
        iteration, interval = self.progress.iteration, self.run_config.rerun_check
        arguments = (self.trained, self.objective, micro_batches)
        rerun = Rerun(*arguments, self.world) if interval and (iteration + 1) % interval == 0 else None
        counts = self.run_config.log_throughput and (self._flops is None or self._counted_at != self.rows.chunk_limit)
        with FlopCount() if counts else contextlib.nullcontext() as count:
            report = train_step(*arguments, iteration, self.world, inspect=None if rerun is None else rerun.compare)
        if count is not None:
            self._flops, self._counted_at = self._mean_over_ranks(count.flops), self.rows.chunk_limit
        if rerun is not None and rerun.differences:
            self.progress.nondeterministic += 1
            if self.world.is_main:
                say(
                    f" warning: stage {self.stage} iteration {iteration + 1} is not deterministic: two passes over the "
                    f"same rows differ in {'; '.join(rerun.differences)}"
                )
        return report

    def _explain(self, micro_batches: list[PackedRow]) -> str:
        """Find out what of this update is not finite, and say it."""
        origin = find_nonfinite(self.trained, self.objective, micro_batches, self.world, self.rows.locate)
        if self.world.is_main:
            say(f" stage {self.stage} iteration {self.progress.iteration} is not finite and was skipped: {origin}")
        return origin

    def _mean_over_ranks(self, value: int) -> float:
        total = torch.tensor(float(value), dtype=torch.float64, device=self.world.device)
        dist.all_reduce(total)
        return float(total) / self.world.size

    def _log(self, window: _Window, report: StepReport, *, force: bool = False) -> None:
        progress, config = self.progress, self.config
        due = progress.iteration % self.run_config.log_interval == 0 or progress.iteration == config.train_iters
        if not (due or force) or not window.updates:
            return
        seconds = (time.perf_counter() - window.started) / window.updates
        means = window.averages()
        if self.world.is_main:
            speed = config.bytes_per_update / seconds
            say(
                log_line(
                    stage=self.stage,
                    iteration=progress.iteration,
                    train_iters=config.train_iters,
                    consumed_rows=progress.consumed_rows,
                    milliseconds=1000 * seconds,
                    learning_rate=report.learning_rate,
                    global_batch_size=config.global_batch_size,
                    averages=means,
                    grad_norm=report.grad_norm,
                    skipped=progress.skipped,
                    nan_iterations=progress.nan_iterations,
                    nondeterministic=progress.nondeterministic if self.run_config.rerun_check else None,
                    bytes_per_second=speed,
                    teraflops=None if self._flops is None else self._flops / seconds / 1e12,
                    eta_seconds=seconds * (config.train_iters - progress.iteration),
                )
            )
            values = {**means, "learning rate": report.learning_rate, "grad norm": report.grad_norm, "bytes/s": speed}
            self.writer.write(self.stage, progress.iteration, values)
        window.sums.clear()
        window.updates, window.started = 0, time.perf_counter()

    def _check_invariants(self, report: StepReport) -> None:
        iteration, interval = self.progress.iteration, self.run_config.check_invariants
        if self.invariants is not None and interval and iteration % interval == 0:
            self.trained.gather_parameters()
            # what is not finite is counted and explained elsewhere
            self.invariants.check(f"stage {self.stage} iteration {iteration}", gradients=not report.skipped)

    def _evaluate_if_due(self) -> None:
        config, iteration = self.config, self.progress.iteration
        at_end = iteration == config.train_iters
        if not config.eval_iters or not (at_end or (config.eval_interval and iteration % config.eval_interval == 0)):
            return
        self.trained.gather_parameters()
        self.trained.position.at("evaluate")
        means = averages(evaluate(self.trained.module, self.objective, self.valid_rows(iteration), self.world))
        if means and self.world.is_main:
            shown = " | ".join(f"{name}: {value:.6E}" for name, value in means.items())
            say(f" validation at stage {self.stage} iteration {iteration} | {shown} |")
            self.writer.write(self.stage, iteration, {f"validation {name}": value for name, value in means.items()})

    def _agree(self) -> tuple[StopReason | None, bool]:
        """(why to stop, whether every rank has written its part of a save under way), the same on all ranks.

        Where any rank has a reason, the gravest one is everybody's.
        """
        interval = self.run_config.exit_interval
        reason = 0
        if self.stop:
            reason = 3
        elif time.monotonic() > self.deadline:
            reason = 2
        elif interval and self.progress.iteration % interval == 0:
            reason = 1
        is_writing = self.saver.is_writing()
        if self.world.size > 1:
            answer = torch.tensor([reason, int(is_writing)], device=self.world.device)
            dist.all_reduce(answer, op=dist.ReduceOp.MAX)
            reason, is_writing = int(answer[0]), bool(answer[1])
        return (None, StopReason.INTERVAL, StopReason.DURATION, StopReason.SIGNAL)[reason], not is_writing

    def _check_weights(self) -> None:
        """TrainingFailure where a weight is not finite, which a finite loss and gradient do not rule out."""
        trained = list(trainable_parameters(self.trained.module))
        bad = [~torch.isfinite(parameter.detach()).all() for _, parameter in trained]
        here = torch.zeros((), dtype=torch.bool, device=self.world.device)  # a pipeline stage may train nothing
        anywhere = torch.stack([here, *bad]).any().to(dtype=torch.int32)
        dist.all_reduce(anywhere, op=dist.ReduceOp.MAX)
        if anywhere.item():
            everywhere: list[list[str]] = [[] for _ in range(self.world.size)]
            dist.all_gather_object(everywhere, [n for (n, _), is_bad in zip(trained, bad, strict=True) if is_bad])
            # only the main rank speaks, and they may be on another rank's pipeline stage
            names = list(dict.fromkeys(name for of_rank in everywhere for name in of_rank))
            raise TrainingFailure(
                f"stage {self.stage}: {len(names)} weights are NaN or infinite after iteration "
                f"{self.progress.iteration} ({', '.join(names[:4])}{', …' if len(names) > 4 else ''}), which is not "
                f"saved; its batch: {self.rows.describe_last()}. The last checkpoint is from before; lower --lr"
            )

    def save(self) -> None:
        """Write this iteration's checkpoint, or begin to."""
        self.trained.gather_parameters()
        self.trained.position.at("save")
        self._check_weights()
        loop = {
            "stage": self.stage,
            "train_iters": self.config.train_iters,
            "progress": asdict(self.progress),
            "rows": self.rows.state_dict(),
            "window": self._window.state(),
            "distributed_optimizer": self.trained.is_distributed,
            **self.extra_state,
        }
        self.saver.save(self.progress.iteration, self.trained.module, self.trained, loop)
