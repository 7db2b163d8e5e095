"""From the command line to the closing table."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from megabyte_distill import __version__, exit_codes, optional
from megabyte_distill.config import STAGE_ORDER, ConfigError, Settings, parse_arguments
from megabyte_distill.config.command_line import asked_text
from megabyte_distill.config.run_config import settings_to_dict
from megabyte_distill.parallel import cpu_megatron
from megabyte_distill.parallel.cpu_memory import keep_large_buffers
from megabyte_distill.parallel.positions import CLOSING, Position
from megabyte_distill.parallel.process_groups import FailureElsewhere, World, on_main_rank, torchrun_environment, world
from megabyte_distill.parallel.watch import PeerLost, is_lost_contact, watched
from megabyte_distill.pretrain.failure import quiet_known_warnings, report_failure
from megabyte_distill.pretrain.run_lock import only_job

if TYPE_CHECKING:
    from megabyte_distill.pretrain.prepare import Prepared
    from megabyte_distill.pretrain.run_data import RunData


def main(argv: Sequence[str], *, example_folder: Path | None = None, example_run: Path | None = None) -> int:
    """Run the selected stages and return the process's exit code.

    Without ``--load`` and data flags the embedded example in ``example_folder`` is used and the run lies in
    ``example_run``. User mistakes end with one message and code 2, failed training with 1, a requested stop with 0.
    """
    quiet_known_warnings()
    rank, size = torchrun_environment()
    if cpu_megatron.apply():
        keep_large_buffers()
    from megabyte_distill.pretrain.example import Example

    example = Example(example_folder) if example_folder is not None else None
    defaults = example.defaults(_save_folder(argv, example_run)) if example is not None else None
    from megabyte_distill.training.failures import TrainingFailure

    try:
        settings = _settings(argv, defaults, rank, size)
        if settings.run.dry_run:
            if rank == 0:
                _dry_run(settings, example, size)
            return 0
        with world(
            tensor_parallel=settings.parallel.tensor_model_parallel_size,
            pipeline_parallel=settings.parallel.pipeline_model_parallel_size,
            seed=settings.run.seed,
            timeout_minutes=settings.parallel.distributed_timeout_minutes,
        ) as ranks:
            return _run(settings, ranks, example)
    except TrainingFailure as failure:
        report_failure(str(failure), rank=rank, everywhere=True)
        return exit_codes.FAILURE
    except ValueError as mistake:
        report_failure(str(mistake), rank=rank, everywhere=isinstance(mistake, ConfigError | FailureElsewhere))
        return exit_codes.MISTAKES
    except OSError as trouble:  # a full disk, a folder that may not be written
        report_failure(f"{trouble}; what was saved before is untouched, the same command goes on from it", rank=rank)
        return exit_codes.FAILURE
    except PeerLost:
        return exit_codes.FAILURE
    except RuntimeError as lost:  # before the ranks were watched
        if size == 1 or not is_lost_contact(lost):
            raise
        report_failure("another rank has ended; what stopped it is in its own message", rank=rank)
        return exit_codes.FAILURE
    except KeyboardInterrupt:
        report_failure("interrupted; the same command goes on from what was saved", rank=rank, everywhere=True)
        return exit_codes.INTERRUPTED


def _settings(argv: Sequence[str], defaults: dict[str, object] | None, rank: int, size: int) -> Settings:
    if (text := asked_text(argv, defaults)) is not None:
        print(text if rank == 0 else "", end="")
        raise SystemExit(0)
    warnings: list[str] = []
    settings = parse_arguments(list(argv), defaults, world_size=size, warn=warnings.append)
    for text in warnings if rank == 0 else ():
        print(f"warning: {text}", file=sys.stderr, flush=True)
    return settings


def _dry_run(settings: Settings, example: object, size: int) -> None:
    from megabyte_distill.config.published import PUBLISHED_BACKBONES
    from megabyte_distill.pretrain.dry_run import dry_run
    from megabyte_distill.pretrain.example import Example

    checkpoint, hf_teacher = settings.checkpoint, None
    wanted = example.defaults(Path(checkpoint.save)) if isinstance(example, Example) and checkpoint.save else {}
    if isinstance(example, Example) and checkpoint.load == wanted.get("load"):
        # nobody named a teacher: the preset's own, else the embedded one
        settings = replace(settings, checkpoint=replace(checkpoint, load=None))
        is_published = settings.model.preset in PUBLISHED_BACKBONES
        hf_teacher = None if is_published else example.folder / "teacher"
    dry_run(settings, size, hf_teacher)


def _save_folder(argv: Sequence[str], default: Path | None) -> Path:
    """Where the run will lie: the example's teacher and data go there too, so it must be known before the defaults."""
    folder = default or Path("runs/tiny")
    for position, argument in enumerate(argv):  # as everywhere, the last one counts
        if argument == "--save" and position + 1 < len(argv):
            folder = Path(argv[position + 1])
        elif argument.startswith("--save="):
            folder = Path(argument.removeprefix("--save="))
    return folder


def _prepare_example(settings: Settings, example: object, ranks: World) -> None:
    """Make the embedded teacher and text ready where the settings name them."""
    from megabyte_distill.pretrain.example import Example

    if not isinstance(example, Example) or settings.checkpoint.save is None:
        return
    root = Path(settings.checkpoint.save)
    wanted = example.defaults(root)
    uses = settings.checkpoint.load == wanted["load"] or settings.data.train_data_path == wanted["train_data_path"]
    if uses:
        if settings.run.fresh:
            on_main_rank(ranks, lambda: example.remove(root))
        on_main_rank(ranks, lambda: example.prepare(root))


def _run(settings: Settings, ranks: World, example: object) -> int:
    from megabyte_distill.pretrain.closing import closing_report, print_saved_summary
    from megabyte_distill.pretrain.prepare import prepare_run
    from megabyte_distill.pretrain.run_data import RunData

    position = Position()
    with contextlib.ExitStack() as stack:
        if settings.checkpoint.save is not None:
            root = Path(settings.checkpoint.save)
            on_main_rank(ranks, lambda: stack.enter_context(only_job(root)))
            position = stack.enter_context(_watched(root, settings, ranks))
        _prepare_example(settings, example, ranks)
        prepared = prepare_run(settings, ranks)
        data = RunData(settings, prepared)
        if not print_saved_summary(settings, prepared, ranks) and _train(settings, prepared, data, ranks, position):
            position.at(CLOSING)
            closing_report(settings, prepared, data, ranks)
    return 0


def _watched(root: Path, settings: Settings, ranks: World) -> contextlib.AbstractContextManager[Position]:
    def report(message: str, is_speaker: bool) -> None:
        report_failure(message, rank=ranks.rank, everywhere=not is_speaker)

    return watched(root, ranks, 60 * settings.parallel.distributed_timeout_minutes, report)


def versions(kernels: str) -> str:
    """What this job runs on, once in the log: libraries, optional packages, and the path of the kernels."""
    parts = [f"{name} {metadata.version(name)}" for name in ("megatron-core", "torch")]
    parts += [f"{name}: {state}" for name, state in optional.describe().items()]
    return f"megabyte-distill {__version__} | {' | '.join(parts)} | kernels: {kernels}"


def _train(settings: Settings, prepared: Prepared, data: RunData, ranks: World, position: Position) -> bool:
    """Run the selected stages; True where they are all complete, False where somebody stopped them."""
    from megabyte_distill.kernels.selection import choose
    from megabyte_distill.pretrain.stage_runner import StageRunner
    from megabyte_distill.training.logging import MetricWriter, say
    from megabyte_distill.training.loop import StopReason
    from megabyte_distill.training.signals import stop_request

    chosen = choose(settings.run.kernels, ranks.device)
    if ranks.is_main:
        say(f" {versions(str(chosen))}")
    limit = settings.run.exit_duration_in_mins
    board = settings.run.tensorboard_dir
    writer = MetricWriter(
        prepared.root if ranks.is_main else None,
        tensorboard_dir=Path(board) if board else None,
        wandb_project=settings.run.wandb_project,
        config=settings_to_dict(settings),
    )
    try:
        with stop_request(settings.run.exit_signal_handler) as stop:
            runner = StageRunner(
                settings=settings,
                prepared=prepared,
                data=data,
                world=ranks,
                writer=writer,
                stop=stop,
                position=position,
                deadline=time.monotonic() + 60 * limit if limit else math.inf,
            )
            for name in (stage for stage in STAGE_ORDER if stage in settings.stages):
                reason = runner.run(name)
                if reason is not StopReason.DONE:
                    if ranks.is_main:
                        who = f", {stop.received}" if stop.received else ""
                        say(f" stopped ({reason.value}{who}); the same command goes on from here")
                    return False
    finally:
        writer.close()
    return True
