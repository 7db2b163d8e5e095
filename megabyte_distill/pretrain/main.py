"""From the command line to the closing table."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from megabyte_distill.config import STAGE_ORDER, Settings, parse_or_exit
from megabyte_distill.parallel import cpu_megatron
from megabyte_distill.parallel.process_groups import World, torchrun_environment, world

EXIT_FAILURE, EXIT_USAGE = 1, 2


def main(argv: Sequence[str], *, example_folder: Path | None = None, example_run: Path | None = None) -> int:
    """Run the selected stages and return the process's exit code.

    Without ``--load`` and data flags the embedded example in ``example_folder`` is used and the run lies in
    ``example_run``. User mistakes end with one message and code 2, failed training with code 1, a requested stop with 0.
    """
    rank, size = torchrun_environment()
    cpu_megatron.apply()
    from megabyte_distill.pretrain.example import Example

    example = Example(example_folder) if example_folder is not None else None
    defaults = example.defaults(_save_folder(argv, example_run)) if example is not None else None
    settings = parse_or_exit(list(argv), defaults, world_size=size, rank=rank)
    from megabyte_distill.training.loop import TrainingFailure

    try:
        with world(
            tensor_parallel=settings.parallel.tensor_model_parallel_size,
            pipeline_parallel=settings.parallel.pipeline_model_parallel_size,
            seed=settings.run.seed,
            timeout_minutes=settings.parallel.distributed_timeout_minutes,
        ) as ranks:
            return _run(settings, ranks, example)
    except TrainingFailure as failure:
        return _fail(failure, rank, EXIT_FAILURE)
    except ValueError as mistake:
        return _fail(mistake, rank, EXIT_USAGE)


def _save_folder(argv: Sequence[str], default: Path | None) -> Path:
    """Where the run will lie: the example's teacher and data go there too, so it must be known before the defaults."""
    for position, argument in enumerate(argv):
        if argument == "--save" and position + 1 < len(argv):
            return Path(argv[position + 1])
        if argument.startswith("--save="):
            return Path(argument.removeprefix("--save="))
    return default or Path("runs/tiny")


def _fail(error: Exception, rank: int, code: int) -> int:
    print(f"error{'' if rank == 0 else f' on rank {rank}'}: {error}", file=sys.stderr, flush=True)
    return code


def _prepare_example(settings: Settings, example: object, ranks: World) -> None:
    """Make the embedded teacher and text ready where the settings name them."""
    from megabyte_distill.pretrain.example import Example

    if not isinstance(example, Example) or settings.checkpoint.save is None:
        return
    root = Path(settings.checkpoint.save)
    wanted = example.defaults(root)
    uses = settings.checkpoint.load == wanted["load"] or settings.data.train_data_path == wanted["train_data_path"]
    if uses and ranks.is_main:
        example.prepare(root)
    dist.barrier()


def _run(settings: Settings, ranks: World, example: object) -> int:
    from megabyte_distill.pretrain.closing import closing_report, print_saved_summary
    from megabyte_distill.pretrain.prepare import prepare_run
    from megabyte_distill.pretrain.stage_runner import StageRunner
    from megabyte_distill.training.logging import MetricWriter, say
    from megabyte_distill.training.loop import StopReason
    from megabyte_distill.training.signals import stop_request

    _prepare_example(settings, example, ranks)
    prepared = prepare_run(settings, ranks)
    if print_saved_summary(settings, prepared, ranks):
        return 0
    limit = settings.run.exit_duration_in_mins
    board = settings.run.tensorboard_dir
    writer = MetricWriter(
        prepared.root if ranks.is_main else None,
        tensorboard_dir=Path(board) if board else None,
        wandb_project=settings.run.wandb_project,
    )
    try:
        with stop_request(settings.run.exit_signal_handler) as stop:
            runner = StageRunner(
                settings=settings,
                prepared=prepared,
                world=ranks,
                writer=writer,
                stop=stop,
                deadline=time.monotonic() + 60 * limit if limit else math.inf,
            )
            for name in (stage for stage in STAGE_ORDER if stage in settings.stages):
                reason = runner.run(name)
                if reason is not StopReason.DONE:
                    if ranks.is_main:
                        say(f" stopped ({reason.value}); the same command goes on from here")
                    return 0
    finally:
        writer.close()
    closing_report(settings, prepared, ranks)
    return 0
