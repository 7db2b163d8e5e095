"""Runs of the curriculum at the demo's size, for benchmarks that compare them: trained, measured, queued."""

from __future__ import annotations

import contextlib
import itertools
import json
import lzma
import multiprocessing
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Container, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from megabyte_distill.config import parse_arguments  # noqa: E402 - after the path is set
from megabyte_distill.files import write_whole  # noqa: E402 - as above

if TYPE_CHECKING:
    from megabyte_distill.model.backbone import Backbone
    from megabyte_distill.model.student import Student
    from megabyte_distill.parallel.process_groups import World
    from megabyte_distill.runs import LoadedStudent
    from megabyte_distill.training.rows import MicroBatches

EXAMPLE = ROOT / "examples" / "tiny"
WORKERS = 2
"""Processes of one thread each."""
PATH_FLAGS = ("--load", "--save", "--train-data-path", "--valid-data-path", "--logits-load-dir")
CACHED = {"context_tokens": 480, "overlap_tokens": 120, "shard_bytes": 1 << 20}
"""How a target cache is made: in windows as long as what the embedded teacher was trained on (rows of 2,048 bytes), in
shards so small that two are made side by side in little memory."""


def bytes_per_update(stage: str) -> int:
    """Of the tiny preset."""
    return parse_arguments(["--mock-data"]).stages[stage].bytes_per_update


def iteration_flags(updates: Mapping[str, int]) -> list[str]:
    """Command line of stages and their numbers of updates."""
    flags = ["--stages", ",".join(updates)]
    for name, count in updates.items():
        flags += [f"--{name}.train-iters", str(count)]
    return flags


@dataclass(frozen=True, slots=True)
class Shared:
    """What all runs of a benchmark start from: the embedded teacher, converted, and text, preprocessed."""

    folder: Path
    every: int = 1
    """Only each so-manieth document of the training text."""

    @property
    def teacher(self) -> Path:
        """Folder of the converted teacher."""
        return self.folder / "teacher"

    @property
    def train(self) -> Path:
        """Stem of the training data."""
        name = "train" if self.every == 1 else f"every-{self.every}"
        return self.folder / "data" / f"{name}_text_document"

    @property
    def held_out(self) -> Path:
        """Stem of the held-out data."""
        return self.folder / "data" / "heldout_text_document"

    @property
    def cache(self) -> Path:
        """Folder of a target cache of the training data."""
        return self.folder / f"cache-{self.every}"

    def prepare(self) -> None:
        """Convert and preprocess what is not there yet."""
        from megabyte_distill.pretrain.failure import quiet_known_warnings

        quiet_known_warnings()  # before megatron is imported, which warns
        from megabyte_distill.data.encoding import EncodeJob
        from megabyte_distill.data.preprocess import PreprocessOptions, preprocess
        from megabyte_distill.parallel.process_groups import world
        from megabyte_distill.pretrain.example import Example

        with world():
            Example(EXAMPLE).prepare(self.folder)
        if not self.train.with_suffix(".json").exists():
            part = self.folder / "data" / f"every-{self.every}.jsonl"
            with lzma.open(EXAMPLE / "train.jsonl.xz", "rt", encoding="utf-8") as lines:
                part.write_text("".join(list(lines)[:: self.every]), encoding="utf-8")
            preprocess(
                [part],
                output_prefix=str(self.train).removesuffix("_text_document"),
                job=EncodeJob(tokenizer_model=str(EXAMPLE / "teacher")),
                options=PreprocessOptions(overwrite=True),
            )

    def make_cache(self) -> dict[str, Any]:
        """Store the teacher's targets for the training data; what tools/cache_teacher.py reports of it, and the
        processor seconds that it took. A cache that is there is made anew: else they would not be counted.
        """
        import torch

        from megabyte_distill.conversion.teacher_folder import find_teacher, load_teacher
        from megabyte_distill.data.dataset import ByteTokenDataset
        from megabyte_distill.parallel.process_groups import world
        from megabyte_distill.pretrain.cache_teacher import CacheSettings, make_cache
        from megabyte_distill.training.target_cache import teacher_hash

        shutil.rmtree(self.cache, ignore_errors=True)
        with world() as here:
            # as training from the cache would run it
            teacher = load_teacher(self.teacher, dtype=torch.float32)
            started = time.process_time()
            report = make_cache(
                self.cache,
                teacher.backbone.requires_grad_(False).eval(),
                teacher.token_bytes,
                [ByteTokenDataset(str(self.train))],
                CacheSettings(**CACHED),
                teacher_hash=teacher_hash(find_teacher(self.teacher).checkpoint),
                world=here,
                say=print,
            )
            taken = time.process_time() - started
        return {**report.as_dict(), "processor_seconds": taken}


def begin_folder(folder: Path, flags: Sequence[str]) -> None:
    """Make a run's folder for a command line; one of the same command stays, however its paths are spelled.

    What another or no command made is moved to a name beside it.
    """
    command, wanted = folder / "command.json", _with_whole_paths(flags)
    if command.exists() and _with_whole_paths(json.loads(command.read_text(encoding="utf-8"))) == wanted:
        return
    if folder.exists():
        free = (folder.with_name(f"{folder.name}.before-{number}") for number in itertools.count(1))
        moved = next(path for path in free if not path.exists())
        folder.rename(moved)
        print(f"{folder} was of another command: moved to {moved}", flush=True)
    folder.mkdir(parents=True)
    command.write_text(json.dumps(wanted), encoding="utf-8")


def _with_whole_paths(flags: Sequence[str]) -> list[str]:
    """The flags with what follows one of PATH_FLAGS resolved."""
    before = ("", *flags)
    return [
        str(Path(word).resolve()) if flag in PATH_FLAGS else word for flag, word in zip(before, flags, strict=False)
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One call of the training command; what it leaves lies in ``folder``."""

    folder: Path
    load: Path
    """The teacher, or a run from whose last stage it starts."""
    seed: int
    flags: tuple[str, ...]

    def train(self, shared: Shared) -> dict[str, float]:
        """Train (or go on), and the wall seconds of its updates and processor seconds of the whole call.

        What another command left in the folder is moved beside it. RuntimeError where the run fails.
        """
        from megabyte_distill.config import STAGE_ORDER
        from megabyte_distill.pretrain.main import main
        from megabyte_distill.runs import stage_progress
        from megabyte_distill.training.checkpoint import read_loop_state

        flags = [
            *("--load", str(self.load), "--save", str(self.folder), "--seed", str(self.seed)),
            *("--train-data-path", str(shared.train), "--valid-data-path", str(shared.held_out)),
            *("--eval-iters", "0", "--save-interval", "0", "--log-interval", "50", "--summary-bytes", "0"),
            *self.flags,
        ]
        begin_folder(self.folder, flags)
        started = time.process_time()
        if main(flags) != 0:
            raise RuntimeError(f"{self.folder.name}: the run failed; its log says why")
        taken = time.process_time() - started
        stages = [progress for name in STAGE_ORDER if (progress := stage_progress(self.folder, name)) is not None]
        states = [read_loop_state(progress.checkpoint)["progress"] for progress in stages]
        return {"seconds": sum(state["seconds"] for state in states), "processor_seconds": taken}


def stepping(loaded: LoadedStudent) -> Student:
    """The student as it steps: of the official dechunk, which looks ahead, the weights in the hard one."""
    from megabyte_distill.config.model import DechunkMode
    from megabyte_distill.runs import build_student

    config, official = loaded.model_config, loaded.student
    if not official.is_official:
        return official
    assert config.byte_side is not None
    student = build_student(replace(config, byte_side=replace(config.byte_side, dechunk_mode=DechunkMode.HARD)))
    weights = official.state_dict()
    del weights["byte_decoder.null_group"]  # no other mode reads it
    student.load_state_dict(weights)
    return student.eval()


def joint_bits(run: Path, shared: Shared, max_bytes: int, *, bits: str = "gold", own_forward: bool = False) -> float:
    """Held-out joint bits per byte of a run's last stage, rows of 2048 bytes.

    ``bits``: whose boundaries are input and label, ``gold`` or ``router``. ``own_forward``: labels are gold ones
    whatever the input, and the dechunk is the run's own: what it was trained on, and no bound where that looks ahead.
    """
    import torch

    from megabyte_distill.data.dataset import ByteTokenDataset
    from megabyte_distill.evaluation.held_out import held_out_rows
    from megabyte_distill.inference.scoring import joint_row_score, score_row
    from megabyte_distill.model.student import Gold, RouterDecides
    from megabyte_distill.objectives.joint_ce import joint_nll
    from megabyte_distill.parallel.process_groups import world
    from megabyte_distill.runs import load_student

    with world(), torch.no_grad():
        loaded = load_student(run)
        student = loaded.student if own_forward else stepping(loaded)
        boundaries = Gold() if bits == "gold" else RouterDecides()
        total, size = 0.0, 0
        for row in held_out_rows([ByteTokenDataset(str(shared.held_out))], row_bytes=2048, max_bytes=max_bytes):
            if own_forward:
                score = joint_row_score(joint_nll(student(row, boundaries).logits, row), row)
            else:
                score = score_row(student, row, boundaries)
            total += float(score.bits.sum())
            size += int(score.bytes.sum())
    return total / size


def token_bits(backbone: Backbone, shared: Shared, max_bytes: int) -> float:
    """A token model's bits per byte on the rows of :func:`joint_bits`."""
    from megabyte_distill.data.dataset import ByteTokenDataset
    from megabyte_distill.evaluation.held_out import held_out_rows
    from megabyte_distill.inference.scoring import score_tokens

    rows = held_out_rows([ByteTokenDataset(str(shared.held_out))], row_bytes=2048, max_bytes=max_bytes)
    scores = [score_tokens(backbone, row) for row in rows]
    return float(sum(score.bits.sum() for score in scores)) / int(sum(score.bytes.sum() for score in scores))


def training_rows(shared: Shared, stage: str, seed: int, here: World) -> MicroBatches:
    """The micro-batches that a stage of a run with this seed reads."""
    from megabyte_distill.data.dataset import ByteTokenDataset
    from megabyte_distill.data.sampler import RowStream
    from megabyte_distill.pretrain.run_data import row_seed
    from megabyte_distill.training.rows import MicroBatches

    config = parse_arguments(["--mock-data"]).stages[stage]
    stream = RowStream(
        [ByteTokenDataset(str(shared.train))],
        row_bytes=config.seq_length,
        chunk_bucket=config.chunk_bucket,
        seed=row_seed(seed, stage),
    )
    return MicroBatches(stream, config, here)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Something that a worker does; its answer is kept under its name and taken from there the next time."""

    name: str
    work: Callable[[], dict[str, Any]]
    identity: Mapping[str, Any] = field(default_factory=dict)
    """What the answer depends on, as JSON: where it is another one, the job is done anew."""
    cost: float = 0.0
    """Of those that can begin, the one of highest cost does."""
    after: Sequence[str] = ()
    """Names of the jobs whose work this one reads: it begins when they are done."""

    def stored(self, folder: Path) -> dict[str, Any] | None:
        """The answer of an earlier call."""
        path = folder / f"{self.name}.json"
        if not path.exists():
            return None
        content = json.loads(path.read_text(encoding="utf-8"))
        return content["answer"] if content["identity"] == json.loads(json.dumps(self.identity)) else None

    def store(self, folder: Path, answer: dict[str, Any]) -> None:
        """Keep the answer; the file is complete or absent."""
        content = {"identity": self.identity, "answer": answer}
        write_whole(folder / f"{self.name}.json", json.dumps(content, indent=1).encode())


def _end_with(parent: int) -> None:
    """Of a worker: it ends with the process that made it, also where that is killed."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def run_jobs(jobs: Sequence[Job], folder: Path, *, workers: int = WORKERS) -> dict[str, dict[str, Any]]:
    """Answers by name; logs and answers lie in ``folder``. What a job raises ends the benchmark, what is done stays."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {job.name: answer for job in jobs if (answer := job.stored(folder)) is not None}
    left = sorted((job for job in jobs if job.name not in found), key=lambda job: -job.cost)
    if found:
        print(f"{len(found)} of {len(jobs)} jobs were done by an earlier call", flush=True)
    if not left:
        return found
    started, number = time.monotonic(), len(left)
    context = multiprocessing.get_context("spawn")
    os.environ["OMP_NUM_THREADS"] = "1"  # for the workers, before they import torch
    parent = os.getpid()
    running: dict[Future[dict[str, Any]], Job] = {}
    with ProcessPoolExecutor(min(workers, number), context, _end_with, (parent,)) as pool:
        try:
            while left or running:
                for job in _ready(left, found)[: workers - len(running)]:
                    left.remove(job)
                    running[pool.submit(_work, job, folder / f"{job.name}.log")] = job
                if not running:
                    raise ValueError(f"jobs wait for others that are not there: {[(j.name, j.after) for j in left]}")
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    job = running.pop(future)
                    found[job.name] = future.result()
                    job.store(folder, found[job.name])
                    minutes, done = (time.monotonic() - started) / 60, number - len(left) - len(running)
                    print(f"[{minutes:5.1f} min] {done} of {number}: {job.name}", flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return found


def _ready(left: Sequence[Job], done: Container[str]) -> list[Job]:
    return [job for job in left if all(name in done for name in job.after)]


def _work(job: Job, log: Path) -> dict[str, Any]:
    with (
        log.open("w", encoding="utf-8") as stream,
        contextlib.redirect_stdout(stream),
        contextlib.redirect_stderr(stream),
    ):
        from megabyte_distill.parallel.cpu_memory import keep_large_buffers

        keep_large_buffers()  # as training does
        return job.work()
