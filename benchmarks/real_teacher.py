#!/usr/bin/env python3
"""The curriculum on a real teacher in the time there is: what each stage reaches on held-out text.

    python benchmarks/real_teacher.py --hf-model DIR --train train.jsonl.xz --held-out heldout.jsonl.xz --minutes 5
    python benchmarks/real_teacher.py … --stages 1a,1c --minutes 55 [training's flags]
    python benchmarks/real_teacher.py --quick          # the embedded teacher and text, under a minute

DIR is a Hugging Face folder that `tools/convert_checkpoint.py import` takes; the texts are what
`tools/preprocess_bytes.py --input` takes. The teacher is converted, the text preprocessed, each stage trained by the
training command and the result measured; --minutes is the time for training and measuring alone. Before a stage, a few
updates tell how many of them fit into its share of the time that is left (benchmarks/time_plan.py); --updates says it
instead. A GPU trains in bf16, a CPU in fp32 with a smaller byte side (FORMS in this file); training's flags behind the
script's own go over both. A --work-dir keeps the converted teacher and the preprocessed text for later calls with the
same ones.

Reported: the teacher's bits per byte when it reads the encoder's states in place of its own embeddings, beside its own
and beside those of an embedding that says nothing (1a); the router's ends against the tokenizer's (1c); the student's
bits per byte and retention (2a, 2b). The last line is JSON; it also lies in the work folder, anew after every stage.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import lzma
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]
warnings.simplefilter("ignore")

from benchmarks import kept_inputs  # noqa: E402 - after the path is set
from benchmarks.time_plan import LEAST_UPDATES, Plan, measured_behind  # noqa: E402
from megabyte_distill.config import CURRICULUM, ConfigError, parse_arguments  # noqa: E402
from megabyte_distill.config.training import KernelMode  # noqa: E402

EXAMPLE = ROOT / "examples" / "tiny"
TRIED_UPDATES, TRIED_SECONDS = 3, 1.0
"""Updates of a trial, fewer where they have taken so long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """Training's flags on a kind of device, and how much text figures are taken on."""

    common: tuple[str, ...]
    stages: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    text_bytes: int
    measuring: float
    """Share of the time that is kept for measuring, until some has been timed."""

    def flags(self, stage: str) -> list[str]:
        """Of one stage."""
        return [*self.common, *self.stages.get(stage, ())]


def _conv(width: int, ffn: int, head: int, router: int, ngram_rows: int) -> tuple[str, ...]:
    """Convolutions, which need no package of kernels. The n-gram tables hold what a tokenizer's vocabulary asks to be
    learned by heart, at the price of a look-up.
    """
    return (
        *("--preset", "tiny", "--byte-mixer", "conv", "--byte-width", str(width), "--conv-ffn-hidden-size", str(ffn)),
        *("--encoder-layers", "4", "--decoder-layers", "4", "--conv-dilations", "1", "2", "4", "8"),
        *("--encoder-ffn-hidden-size", str(head), "--decoder-ffn-hidden-size", str(head)),
        *("--router-hidden-size", str(router)),
        *("--byte-ngram-tables", "3", "4", "5", "6", "--byte-ngram-rows", str(ngram_rows)),
    )


FORMS: Mapping[str, Form] = {
    "cuda": Form(
        common=(
            *_conv(512, 1024, 2048, 1024, 32_768),
            *("--bf16", "--seq-length", "8192", "--micro-batch-size", "8", "--global-batch-size", "8"),
            *("--chunk-bucket", "256"),
        ),
        stages={
            "1a": ("--lr", "2e-3"),
            "1b": ("--lr", "4e-4", "--backbone-lr", "1e-4"),
            "1c": ("--lr", "2e-3"),
            "2a": ("--lr", "2e-3"),
            "2b": ("--lr", "5e-4", "--backbone-lr", "1e-4"),
        },
        text_bytes=150_000,
        measuring=0.15,
    ),
    "cpu": Form(
        common=(
            *_conv(256, 512, 1024, 512, 16_384),
            *("--seq-length", "2048", "--micro-batch-size", "2", "--global-batch-size", "2"),
        ),
        stages={
            "1a": ("--lr", "3e-3"),
            "1b": ("--lr", "4e-4", "--backbone-lr", "1e-4"),
            "1c": ("--lr", "3e-3"),
            "2a": ("--lr", "3e-3"),
            "2b": ("--lr", "5e-4", "--backbone-lr", "1e-4"),
        },
        text_bytes=40_000,
        measuring=0.1,
    ),
    "quick": Form(common=("--preset", "tiny"), text_bytes=4_096, measuring=0.2),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What a stage cost."""

    updates: int
    bytes: int
    seconds: float
    """Of its updates."""
    beside: float = 0.0
    """Seconds of everything else: trial, loading, saving."""


@dataclass(frozen=True, slots=True)
class Bench:
    """The teacher and texts of a benchmark, the run that is trained, and the flags it is trained with."""

    folder: Path
    form: Form
    flags: tuple[str, ...]

    @property
    def teacher(self) -> Path:
        """The converted teacher."""
        return self.folder / "teacher"

    @property
    def run(self) -> Path:
        """The run's folder."""
        return self.folder / "run"

    def data(self, name: str) -> Path:
        """Stem of a data set, ``train`` or ``heldout``."""
        return self.folder / "data" / f"{name}_text_document"

    def preprocess(self, hf_model: Path, texts: Mapping[str, Sequence[Path]]) -> None:
        """Make the data sets that are not there yet."""
        from megabyte_distill.data.encoding import EncodeJob
        from megabyte_distill.data.preprocess import PreprocessOptions, preprocess

        for name, inputs in texts.items():
            if not self.data(name).with_suffix(".json").exists():
                self.data(name).parent.mkdir(parents=True, exist_ok=True)
                preprocess(
                    inputs,
                    output_prefix=str(self.data(name)).removesuffix("_text_document"),
                    job=EncodeJob(tokenizer_model=str(hf_model)),
                    options=PreprocessOptions(overwrite=True, workers=os.cpu_count() or 1),
                )

    def convert(self, hf_model: Path) -> None:
        """Convert the teacher, unless that is done; needs process groups, as all that follows."""
        from megabyte_distill.conversion.hf_import import import_teacher

        if not self.teacher.exists():
            import_teacher(hf_model, self.teacher)

    def sizes(self) -> dict[str, int]:
        """Bytes of text of each data set."""
        from megabyte_distill.data.dataset import ByteTokenDataset

        return {name: int(ByteTokenDataset(str(self.data(name))).sizes().sum()) for name in ("train", "heldout")}

    def figures_of(self, part: str, stages: Sequence[str]) -> dict[str, Any]:
        """What the stages reached: of ``stage1`` those among them, or of the ``student``."""
        from benchmarks.run_figures import figure_rows, measure_stage1, measure_student

        rows = figure_rows(str(self.data("heldout")), self.form.text_bytes)
        if part == "stage1":
            found = measure_stage1(self.run, rows, stages)
        else:
            found = measure_student(self.run, rows, str(self.data("train")))
        release()
        return found

    def stage_flags(self, stage: str) -> list[str]:
        """The training command's, but for the number of updates."""
        return [
            *("--load", str(self.teacher), "--save", str(self.run), "--stages", stage),
            *("--train-data-path", str(self.data("train")), "--valid-data-path", str(self.data("heldout"))),
            *("--eval-interval", "0", "--eval-iters", "4", "--save-interval", "0", "--summary-bytes", "0"),
            *self.form.flags(stage),
            *self.flags,
        ]

    def time_update(self, stage: str) -> tuple[float, int]:
        """(seconds, rows of a micro-batch) of an update of fresh weights on the training text; fewer rows than the
        settings' where the memory of the device does not hold those.
        """
        settings = parse_arguments(self.stage_flags(stage), world_size=1)
        config = settings.stages[stage]
        rows = config.micro_batch_size
        while True:
            try:
                return self._time_update(stage, rows) * (config.global_batch_size // rows), rows
            except torch.OutOfMemoryError:
                if rows % 2:
                    raise
                rows //= 2
            finally:
                release()

    def _time_update(self, stage: str, rows: int) -> float:
        from benchmarks.gpu_training import Trial, timed
        from megabyte_distill.conversion.model_config import read_model_config
        from megabyte_distill.conversion.teacher_folder import find_teacher
        from megabyte_distill.conversion.tokenizer_files import TOKEN_BYTES_FILE
        from megabyte_distill.data.dataset import ByteTokenDataset
        from megabyte_distill.data.sampler import RowStream
        from megabyte_distill.data.token_bytes import TokenBytes
        from megabyte_distill.kernels.selection import choose
        from megabyte_distill.parallel.process_groups import current_world

        settings = parse_arguments([*self.stage_flags(stage), *micro_batch(stage, rows)], world_size=1)
        config = settings.stages[stage]
        here = current_world()
        choose(KernelMode.AUTO, here.device)
        stream = RowStream(
            [ByteTokenDataset(str(self.data("train")))],
            row_bytes=config.seq_length,
            chunk_bucket=config.chunk_bucket,
            seed=1,
        )
        token_bytes = TokenBytes.load(find_teacher(self.teacher).tokenizer / TOKEN_BYTES_FILE)
        trial = Trial(settings, read_model_config(self.teacher).backbone, stage, here, (stream, token_bytes))
        trial.update()  # the first one makes what the others find
        taken = [timed(trial.update, here.device)]
        while len(taken) < TRIED_UPDATES and sum(taken) < TRIED_SECONDS:
            taken.append(timed(trial.update, here.device))
        return sorted(taken)[len(taken) // 2]

    def train(self, stage: str, updates: int, further: Sequence[str]) -> Trained:
        """One stage by the training command, with further flags; RuntimeError where it fails."""
        from megabyte_distill.pretrain.main import main as train
        from megabyte_distill.runs import stage_progress
        from megabyte_distill.training.checkpoint import read_loop_state

        flags = [*self.stage_flags(stage), f"--{stage}.train-iters", str(updates), *further]
        if train([*flags, "--log-interval", str(max(1, updates // 5))]) != 0:
            raise RuntimeError(f"stage {stage} failed; its log says why")
        release()
        progress = stage_progress(self.run, stage)
        assert progress is not None
        state = read_loop_state(progress.checkpoint)["progress"]
        return Trained(updates=progress.iteration, bytes=state["consumed_bytes"], seconds=state["seconds"])


def micro_batch(stage: str, rows: int) -> list[str]:
    """Flags of a stage's micro-batches of so many rows."""
    return [f"--{stage}.micro-batch-size", str(rows)]


def release() -> None:
    """Give back what a model held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def build_parser() -> argparse.ArgumentParser:
    """The command line, but for training's flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--hf-model", type=Path, metavar="DIR", help="Hugging Face folder of the teacher (the embedded one)")
    add("--train", type=Path, nargs="+", metavar="FILE", help="training text (the embedded one), with --held-out")
    add("--held-out", type=Path, nargs="+", metavar="FILE", help="text that figures are taken on, with --train")
    add("--stages", default=",".join(CURRICULUM), help="stages, separated by commas (1a,1b,1c,2a,2b)")
    add("--minutes", type=float, help="time for training and measuring, behind the preparation")
    add("--updates", type=int, metavar="N", help="updates of every stage, whatever time they take")
    add("--form", choices=tuple(FORMS), help="flags of training (of the device: cuda or cpu)")
    add("--text-bytes", type=int, metavar="N", help="held-out text at most (of the form)")
    add("--work-dir", type=Path, metavar="DIR", help="where everything is written, for these inputs alone (temporary)")
    add("--quick", action="store_true", help="a few updates of the tiny preset, under a minute on a CPU")
    return parser


def texts_of(arguments: argparse.Namespace, folder: Path) -> tuple[Path, dict[str, list[Path]]]:
    """(Hugging Face folder, inputs of each data set); of the embedded text every tenth document."""
    texts: dict[str, list[Path]] = {}
    for name, given in (("train", arguments.train), ("heldout", arguments.held_out)):
        if given is None:
            part = folder / f"{name}.jsonl"
            with lzma.open(EXAMPLE / f"{name}.jsonl.xz", "rt", encoding="utf-8") as lines:
                part.write_text("".join(list(lines)[::10]), encoding="utf-8")
        texts[name] = given or [part]
    return arguments.hf_model or EXAMPLE / "teacher", texts


def line(name: str, done: Trained) -> str:
    """A stage's line of the table."""
    return (
        f"  {name}  {done.updates:7,} updates  {done.bytes / 1e6:9.2f} MB  {done.seconds:8.1f} s  "
        f"{done.bytes / done.seconds / 1e3:9.1f} kB/s  {done.beside:6.1f} s beside"
    )


def table(results: Mapping[str, Any]) -> str:
    """What was found, for a person."""
    lines = [f"{results['device']}, form {results['form']}, {results['minutes']:.1f} minutes behind the preparation"]
    lines += [line(name, Trained(**done)) for name, done in results["stages"].items()]
    for part in ("stage1", "student"):
        for name, value in results.get(part, {}).items():
            if isinstance(value, float):
                lines.append(f"  {part}  {name:36} {value:12.4f}")
    return "\n".join(lines)


class Report:
    """The results so far, on the disk after every step."""

    def __init__(self, path: Path, **found: Any) -> None:
        self.path, self.started = path, time.monotonic()
        self.results: dict[str, Any] = {**found, "stages": {}, "measuring": {}, "minutes": 0.0}

    def begin(self) -> None:
        """Count minutes from now on; what was before is the preparation."""
        now = time.monotonic()
        self.results["preparing"], self.started = now - self.started, now

    def add(self, **found: Any) -> None:
        self.results |= found
        self.results["minutes"] = (time.monotonic() - self.started) / 60
        self.path.write_text(json.dumps(self.results) + "\n", encoding="utf-8")


def train_all(bench: Bench, stages: Sequence[str], arguments: argparse.Namespace, report: Report) -> None:
    """Every stage, each with the updates that are asked for or fit, and what they reached."""
    report.begin()
    plan = Plan.of(stages, report.started, 60.0 * (arguments.minutes or 0.0), bench.form.measuring)
    parts = measured_behind(stages)
    for name in stages:
        begun, further = time.monotonic(), []
        updates = arguments.updates
        if updates is None:
            update_seconds, rows = bench.time_update(name)
            further = micro_batch(name, rows)
            updates = plan.updates(name, update_seconds, begun, time.monotonic())
            print(f"{name}: {1e3 * update_seconds:.0f} ms an update in a trial: {updates:,} updates", flush=True)
        done = bench.train(name, updates, further)
        # a stage that an earlier call began has the seconds of then among its own
        done = replace(done, beside=max(0.0, time.monotonic() - begun - done.seconds))
        if arguments.updates is None:
            plan.trained(name, update_seconds, updates, done.seconds, done.beside)
        report.add(stages={**report.results["stages"], name: asdict(done)})
        print(line(name, done), flush=True)
        if part := parts.get(name):
            begun = time.monotonic()
            report.add(**{part: bench.figures_of(part, stages)})
            taken = time.monotonic() - begun
            report.add(measuring={**report.results["measuring"], part: taken})
            if arguments.updates is None:
                plan.measured(part, taken)
            print(f"{table(report.results)}\n  measured in {taken:.1f} s", flush=True)


def stages_of(given: str) -> list[str]:
    """The stages that --stages names, in their order; ValueError where it names another."""
    names = [name.strip() for name in given.split(",")]
    if unknown := [name for name in names if name not in CURRICULUM]:
        expected = f"expected some of {','.join(CURRICULUM)}, separated by commas"
        raise ValueError(f"--stages {given}: got {', '.join(map(repr, unknown))}, {expected}")
    return [name for name in CURRICULUM if name in names]


def check_inputs(arguments: argparse.Namespace) -> None:
    """ValueError where inputs are given that measure nothing together."""
    if (arguments.train is None) != (arguments.held_out is None):
        got, missing = ("--train", "--held-out") if arguments.held_out is None else ("--held-out", "--train")
        raise ValueError(f"got {got} without {missing}, expected both: the embedded text is of another kind")
    if arguments.hf_model is not None and arguments.train is None:
        raise ValueError("got --hf-model without --train and --held-out, expected all three: the embedded text is tiny")


def check_flags(bench: Bench, stages: Sequence[str], updates: int | None) -> None:
    """ValueError with what is wrong with the flags of training, of the first stage that does not take them."""
    for name in stages:
        counted = [] if updates is None else [f"--{name}.train-iters", str(updates)]
        try:
            parse_arguments([*bench.stage_flags(name), *counted], world_size=1)
        except ConfigError as error:
            raise ValueError(f"training does not take the flags of stage {name}: {error}") from None


def read_command_line(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str], list[str]]:
    """(the script's arguments, all checked; flags of training; stages). Exits with 2 and a message where one is wrong.

    Prepares nothing but the work folder, where one is given.
    """
    parser = build_parser()
    arguments, flags = parser.parse_known_args(argv)
    if arguments.minutes is None and arguments.updates is None:
        arguments.updates = LEAST_UPDATES if arguments.quick else parser.error("give --minutes or --updates")
    if arguments.minutes is not None and arguments.minutes <= 0:
        parser.error(f"got --minutes {arguments.minutes:g}, expected more than none")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    arguments.form = arguments.form or ("quick" if arguments.quick else device)
    try:
        stages = stages_of(arguments.stages)
        check_inputs(arguments)
        folder = arguments.work_dir or Path("unused")
        check_flags(Bench(folder, FORMS[arguments.form], tuple(flags)), stages, arguments.updates)
        inputs = {
            "--hf-model": kept_inputs.of_folder(arguments.hf_model),
            "--train": kept_inputs.of_texts(arguments.train),
            "--held-out": kept_inputs.of_texts(arguments.held_out),
        }
        if arguments.work_dir is not None:
            folder.mkdir(parents=True, exist_ok=True)
            kept_inputs.keep(folder, inputs, [folder / name for name in ("teacher", "data", "run")])
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return arguments, flags, stages


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    arguments, flags, stages = read_command_line(argv)
    from megabyte_distill.pretrain.failure import quiet_known_warnings

    quiet_known_warnings()  # before megatron is imported, which warns
    from megabyte_distill.parallel.process_groups import world

    form = FORMS[arguments.form]
    form = replace(form, text_bytes=arguments.text_bytes or form.text_bytes)
    with contextlib.ExitStack() as stack:
        folder = arguments.work_dir or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        report = Report(
            folder / "results.json", device=device, torch=torch.__version__, form=arguments.form, flags=flags
        )
        bench = Bench(folder, form, tuple(flags))
        hf_model, texts = texts_of(arguments, folder)
        bench.preprocess(hf_model, texts)
        # one world for everything: process groups on a GPU are not taken down and made again between stages
        stack.enter_context(world())
        bench.convert(hf_model)
        report.add(bytes_of=bench.sizes())
        print(f"converted and preprocessed after {60 * report.results['minutes']:.0f} s", flush=True)
        train_all(bench, stages, arguments, report)
        print(json.dumps(report.results))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
