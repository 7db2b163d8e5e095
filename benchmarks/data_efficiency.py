#!/usr/bin/env python3
"""How many bytes, and how much time, stage 2 needs with the teacher's exact targets instead of hard labels.

    python benchmarks/data_efficiency.py             # three seeds: an hour on two quiet cores
    python benchmarks/data_efficiency.py --long      # of twice the bytes, docs/results.md's: about an hour and a half
    python benchmarks/data_efficiency.py --short     # one seed, shorter runs: about five minutes
    python benchmarks/data_efficiency.py --quick     # under a minute: shows that it runs, its figures mean nothing

One stage-1 checkpoint a seed (1a, 1b, 1c), from which every arm starts and reads the same bytes in the same order: 2a,
then 2b with an eighth of the bytes. Each point of a curve is a run of its own length with its own learning rate
schedule. The measure is joint bits per byte on the held-out works. Arms: hard labels; exact targets, the teacher beside
the student; half of each; exact targets from a target cache; in 2a those of the student's own frozen backbone and token
head (own). Beside them the teacher itself, trained on with its own loss on the same bytes: what the text alone still
teaches.

The bytes factor of an arm is how many times its bytes hard labels need for its quality, interpolated on the logarithm
of bytes. The time factor divides that by what a byte costs in the arm over one with hard labels; that ratio is taken
from updates in turns in one process (processor seconds, medians). Of the cached arm it leaves out making the cache,
which serves any number of runs; a second figure counts it, for the bytes that the run reads. Two workers of one thread
each do the runs; finished ones are taken from the work folder. The markdown tables are for docs/results.md; the last
line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.curriculum_runs import (
    CACHED,
    WORKERS,
    Job,
    Run,
    Shared,
    bytes_per_update,
    iteration_flags,
    joint_bits,
    run_jobs,
)
from benchmarks.curves import bytes_needed, factors, headline, spread, spreads
from megabyte_distill.config import parse_arguments

ARMS: Mapping[str, tuple[str, ...]] = {
    "hard": ("--byte-targets", "hard"),
    "exact": ("--byte-targets", "exact", "--2a.exact-targets-from", "teacher"),
    "mixed": ("--byte-targets", "mixed", "--2a.exact-targets-from", "teacher"),
    "cached": ("--byte-targets", "exact"),
    "own": ("--byte-targets", "exact", "--2a.exact-targets-from", "student"),
}
"""``cached`` with the target cache beside it."""
REFERENCE = "hard"
CACHE_JOB = "cache"
WITH_CACHING = "time_factor_cached_with_its_making"
SHARE_OF_2B = 1 / 8
"""Of the bytes of stage 2; the demo's is about as large."""
TEACHER_RATES = (3e-4, 5e-5)
"""Learning rates with which the teacher trains on: the first is what 2b gives the backbone."""
KIB = 1 << 10
COLOURS = ("#6b7280", "#1f6fb4", "#3a8f4a", "#d1752a", "#8b5fb0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """How much is run."""

    stage1: Mapping[str, int]
    """Updates of each stage before the arms."""
    sizes: Mapping[str, Sequence[int]]
    """KiB of stage 2 of each arm's points, ascending. Hard labels go further, since the others are measured by them."""
    seeds: Sequence[int]
    every: int
    """Only each so-manieth document of the training text."""
    held_out_bytes: int
    timed_updates: int


LONG = Form(
    stage1={"1a": 600, "1b": 50, "1c": 75},
    sizes={
        "hard": (1024, 2048, 4096),
        "exact": (1024, 2048),
        "mixed": (1024, 2048),
        "cached": (2048,),
        "own": (1024, 2048),
    },
    seeds=(1, 2, 3),
    every=1,
    held_out_bytes=100_000,
    timed_updates=40,
)
FULL = replace(
    LONG,
    sizes={"hard": (512, 1024, 2048), "exact": (512, 1024), "mixed": (1024,), "cached": (1024,), "own": (512, 1024)},
)
SHORT = Form(
    stage1={"1a": 300, "1b": 25, "1c": 40},
    sizes={"hard": (64, 128, 256), "exact": (64, 128), "mixed": (128,), "cached": (128,), "own": (128,)},
    seeds=(1,),
    every=8,
    held_out_bytes=50_000,
    timed_updates=10,
)
QUICK = Form(
    stage1={"1a": 4, "1b": 2, "1c": 2},
    sizes={"hard": (8, 16), "exact": (8,), "mixed": (8,), "cached": (8,), "own": (8,)},
    seeds=(1,),
    every=400,
    held_out_bytes=2048,
    timed_updates=2,
)


def stage2_updates(size: int) -> dict[str, int]:
    """Updates of 2a and 2b that together read ``size`` bytes, as near as whole updates come."""
    of_2b = max(1, round(SHARE_OF_2B * size / bytes_per_update("2b")))
    return {"2a": max(1, round((size - of_2b * bytes_per_update("2b")) / bytes_per_update("2a"))), "2b": of_2b}


def flags_of(arm: str, shared: Shared) -> tuple[str, ...]:
    """What an arm's command line has beside its length."""
    cache = ("--logits-load-dir", str(shared.cache)) if arm == "cached" else ()
    return (*ARMS[arm], *cache)


def sizes_of(arm: str, form: Form) -> list[int]:
    """Bytes of stage 2 of an arm's points."""
    return [KIB * size for size in form.sizes[arm]]


def train_arm(run: Run, shared: Shared, held_out_bytes: int) -> dict[str, Any]:
    """A point of a curve; its checkpoints are removed."""
    shutil.rmtree(run.folder, ignore_errors=True)  # what was left half done would not count its processor time
    taken = run.train(shared)
    found = joint_bits(run.folder, shared, held_out_bytes)
    shutil.rmtree(run.folder)
    return {**taken, "bits_per_byte": found}


def train_teacher_on(shared: Shared, size: int, seed: int, rate: float, held_out_bytes: int) -> dict[str, Any]:
    """The teacher before and after its own loss on the bytes that the arms of a seed read, at a learning rate."""
    import torch

    from benchmarks.curriculum_runs import token_bits, training_rows
    from megabyte_distill.conversion.teacher_folder import load_teacher
    from megabyte_distill.objectives.token_ce import TokenCrossEntropy
    from megabyte_distill.parallel.process_groups import world
    from megabyte_distill.training.optimizer import wrap_for_training
    from megabyte_distill.training.step import train_step

    updates = stage2_updates(size)
    total = sum(updates.values())
    with world(seed=seed) as here:
        teacher = load_teacher(shared.teacher, dtype=torch.float32).backbone
        before = token_bits(teacher.eval(), shared, held_out_bytes)
        config = parse_arguments(["--mock-data"]).stages["2b"]
        config = replace(config, train_iters=total, lr=rate, backbone_lr=None)
        trained = wrap_for_training(teacher.requires_grad_(True).train(), teacher.config, config)
        objective = TokenCrossEntropy()
        done = 0
        for stage, count in updates.items():
            rows = training_rows(shared, stage, seed, here)
            for _ in range(count):
                train_step(trained, objective, rows.next_micro_batches(done), done, here)
                done += 1
        after = token_bits(teacher.eval(), shared, held_out_bytes)
    return {"before": before, "after": after}


def time_updates(shared: Shared, updates: int) -> dict[str, Any]:
    """Processor seconds a byte of text of each stage and arm, taken in turns in one process."""
    from benchmarks.update_times import Arm, in_turns
    from megabyte_distill.data.dataset import ByteTokenDataset
    from megabyte_distill.parallel.process_groups import world

    found: dict[str, Any] = {}
    with world() as here:
        dataset = ByteTokenDataset(str(shared.train))
        for stage in ("2a", "2b"):
            arms = {arm: Arm(stage, shared.folder, dataset, flags_of(arm, shared), here) for arm in ARMS}
            taken = in_turns(arms, updates)
            found[stage] = {arm: seconds / arms[arm].bytes_per_update for arm, seconds in taken.items()}
    return found


# --- what is made of their answers


def cost_ratios(times: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """What a byte of stage 2 costs in each arm over one with hard labels, both stages weighed by their bytes."""
    cost = {arm: (1 - SHARE_OF_2B) * times["2a"][arm] + SHARE_OF_2B * times["2b"][arm] for arm in times["2a"]}
    return {arm: value / cost[REFERENCE] for arm, value in cost.items()}


def caching_ratio(cache: Mapping[str, float], times: Mapping[str, Mapping[str, float]], size: int) -> float:
    """What caching the text of ``size`` bytes of stage 2 costs over training on them with hard labels.

    Text that is read again is cached once.
    """
    hard = (1 - SHARE_OF_2B) * times["2a"][REFERENCE] + SHARE_OF_2B * times["2b"][REFERENCE]
    cached = min(size, cache["text_bytes"])
    return cache["processor_seconds"] / cache["text_bytes"] * cached / (hard * size)


def point_name(arm: str, size: int, seed: int) -> str:
    """Of a point's job."""
    return f"{arm}-{size // KIB}k-{seed}"


@dataclass(frozen=True, slots=True)
class Plan:
    """The jobs of a form."""

    form: Form
    root: Path
    shared: Shared

    def stage1(self, seed: int) -> Run:
        """What all arms of a seed start from."""
        flags = tuple(iteration_flags(self.form.stage1))
        return Run(folder=self.root / f"stage1-{seed}", load=self.shared.teacher, seed=seed, flags=flags)

    def jobs(self) -> list[Job]:
        """All of them."""
        return [*self._needed_first(), *self._points(), *self._others()]

    def _needed_first(self) -> list[Job]:
        common = {"stage1": self.form.stage1, "every": self.form.every}
        made = {"every": self.form.every, "measured": "processor_seconds", **CACHED}
        jobs = [Job(name=CACHE_JOB, work=self.shared.make_cache, identity=made, cost=math.inf)]
        for run in map(self.stage1, self.form.seeds):
            work = partial(run.train, self.shared)
            jobs.append(Job(name=run.folder.name, work=work, identity=common, cost=math.inf))
        return jobs

    def _points(self) -> list[Job]:
        """A job a point of each arm's curve."""
        arms = [(arm, size) for arm in ARMS for size in sizes_of(arm, self.form)]
        return [self._point(arm, size, seed) for arm, size in arms for seed in self.form.seeds]

    def _point(self, arm: str, size: int, seed: int) -> Job:
        name, updates = point_name(arm, size, seed), stage2_updates(size)
        flags = (*iteration_flags(updates), *flags_of(arm, self.shared))
        start = self.stage1(seed).folder
        run = Run(folder=self.root / "runs" / name, load=start, seed=seed, flags=flags)
        return Job(
            name=name,
            work=partial(train_arm, run, self.shared, self.form.held_out_bytes),
            identity={**self._judged, "updates": updates, "flags": ARMS[arm], **(CACHED if arm == "cached" else {})},
            cost=size,
            after=(start.name, CACHE_JOB) if arm == "cached" else (start.name,),
        )

    @property
    def _judged(self) -> dict[str, Any]:
        form = self.form
        return {"stage1": form.stage1, "every": form.every, "held_out_bytes": form.held_out_bytes}

    def _others(self) -> list[Job]:
        """The teacher trained on, on as many bytes as the longest arm beside hard labels; and the times."""
        size = max(size for arm in ARMS if arm != REFERENCE for size in sizes_of(arm, self.form))
        judged, held_out_bytes = {**self._judged, "bytes": size}, self.form.held_out_bytes
        jobs = [
            Job(
                name=f"teacher-{rate}-{seed}",
                work=partial(train_teacher_on, self.shared, size, seed, rate, held_out_bytes),
                identity=judged,
                cost=size,
            )
            for seed in self.form.seeds
            for rate in TEACHER_RATES
        ]
        updates = self.form.timed_updates
        timed = {"updates": updates, "flags": dict(ARMS)}
        times = partial(time_updates, self.shared, updates)
        # the longest that no other waits for, so not last and alone
        return [*jobs, Job(name="times", work=times, identity=timed, cost=math.inf, after=(CACHE_JOB,))]


def result_of(form: Form, answers: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The figures, from what the jobs answered."""
    curves = {
        arm: [
            {size: answers[point_name(arm, size, seed)]["bits_per_byte"] for size in sizes_of(arm, form)}
            for seed in form.seeds
        ]
        for arm in ARMS
    }
    ratios = cost_ratios(answers["times"])
    result: dict[str, Any] = {"seeds": list(form.seeds), "stage1_updates": dict(form.stage1), "cost_ratios": ratios}
    for arm in ARMS:
        if arm == REFERENCE:
            continue
        by_seed = [factors(hard, own) for hard, own in zip(curves[REFERENCE], curves[arm], strict=True)]
        found = headline(by_seed)
        result[f"bytes_factor_{arm}"] = found
        result[f"time_factor_{arm}"] = over_cost(found, ratios[arm])
    result[WITH_CACHING] = dict(result["time_factor_cached"])
    if (size := result[WITH_CACHING]["at_bytes"]) is not None:
        cost = ratios["cached"] + caching_ratio(answers["cache"], answers["times"], size)
        result[WITH_CACHING] = over_cost(result["bytes_factor_cached"], cost)
    runs = [point_name(arm, size, seed) for arm in ARMS for size in sizes_of(arm, form) for seed in form.seeds]
    teacher = {rate: [answers[f"teacher-{rate}-{seed}"] for seed in form.seeds] for rate in TEACHER_RATES}
    return {
        **result,
        "bits_per_byte": {arm: [{str(size): bits for size, bits in c.items()} for c in curves[arm]] for arm in ARMS},
        **spreads(list(curves.values())),
        "teacher": {
            "before": next(iter(teacher.values()))[0]["before"],
            "after": {str(rate): [one["after"] for one in found] for rate, found in teacher.items()},
        },
        "seconds_per_byte": answers["times"],
        "cache": answers["cache"],
        "run_seconds": {name: [answers[name]["seconds"], answers[name]["processor_seconds"]] for name in runs},
    }


def over_cost(bytes_factor: Mapping[str, Any], cost: float) -> dict[str, Any]:
    """The time factor of an arm whose bytes cost so much."""
    scaled = {name: None if bytes_factor[name] is None else bytes_factor[name] / cost for name in ("mean", "spread")}
    return {"at_bytes": bytes_factor["at_bytes"], **scaled}


def tables(result: Mapping[str, Any]) -> str:
    """Markdown for docs/results.md."""
    curves = result["bits_per_byte"]
    lines = ["| bytes of stage 2 | " + " | ".join(f"{arm}, bits per byte | times the bytes" for arm in curves) + " |"]
    lines[0] = lines[0].replace("hard, bits per byte | times the bytes", "hard, bits per byte")
    lines.append("|" + "---|" * (2 * len(curves)))
    for size in curves[REFERENCE][0]:
        cells = [f"{int(size) // KIB} KiB"]
        for arm, seeds in curves.items():
            values = [curve[size] for curve in seeds if size in curve]
            cells.append(shown(values, 4) if values else "")
            if arm != REFERENCE:
                cells.append(factor_cell(curves[REFERENCE], seeds, size) if values else "")
        lines.append("| " + " | ".join(cells) + " |")
    others = [arm for arm in ARMS if arm != REFERENCE]
    lines += ["", f"| | {' | '.join(others)} |", "|---" * (1 + len(others)) + "|"]
    lines.append("| a byte costs, times hard labels | " + cells_of(result["cost_ratios"], "{:.2f}") + " |")
    for name in ("bytes", "time"):
        texts = [headline_cell(result[f"{name}_factor_{arm}"]) for arm in others]
        lines.append(f"| {name} factor | " + " | ".join(texts) + " |")
    counted = [headline_cell(result[WITH_CACHING]) if arm == "cached" else "" for arm in others]
    lines.append("| time factor, making the cache counted | " + " | ".join(counted) + " |")
    teacher = result["teacher"]
    after = (f"{shown(values, 4)} at a learning rate of {rate}" for rate, values in teacher["after"].items())
    lines += ["", f"The teacher: {teacher['before']:.4f}; trained on: {', '.join(after)}."]
    return "\n".join(lines)


def headline_cell(found: Mapping[str, Any]) -> str:
    """Mean ± spread over seeds, or a dash."""
    return "–" if found["mean"] is None else f"{found['mean']:.2f} ± {found['spread']:.2f}"


def factor_cell(reference: Sequence[Mapping[str, float]], arm: Sequence[Mapping[str, float]], size: str) -> str:
    """An arm's factor at a size: of the seeds that have one, or the bound that all lie beyond."""
    hard = [{int(other): bits for other, bits in curve.items()} for curve in reference]
    needed = [bytes_needed(curve, own[size]) for curve, own in zip(hard, arm, strict=True)]
    found = [value / int(size) for value in needed if value is not None]
    if found:
        return shown(found, 2) + ("" if len(found) == len(needed) else f" ({len(found)} of {len(needed)} seeds)")
    first, last = min(hard[0]), max(hard[0])
    is_ahead = statistics.mean(own[size] for own in arm) < statistics.mean(curve[first] for curve in hard)
    return f"> {last / int(size):.1f}" if is_ahead else f"< {first / int(size):.1f}"


def shown(values: Sequence[float], digits: int) -> str:
    """Mean ± spread."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {spread(values):.{digits}f}" if len(values) > 1 else mean


def cells_of(values: Mapping[str, float], form: str) -> str:
    """Of all arms but the reference."""
    return " | ".join(form.format(values[arm]) for arm in ARMS if arm != REFERENCE)


def plot(result: Mapping[str, Any], target: Path) -> None:
    """Bits per byte against bytes of stage 2, and against their processor time; a line an arm, a mark a seed."""
    from matplotlib.figure import Figure

    from megabyte_distill.evaluation.png import save_figure

    figure = Figure(figsize=(9.0, 4.2), dpi=130, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    hard = result["seconds_per_byte"]
    second = (1 - SHARE_OF_2B) * hard["2a"][REFERENCE] + SHARE_OF_2B * hard["2b"][REFERENCE]
    for colour, (arm, seeds) in zip(COLOURS, result["bits_per_byte"].items(), strict=True):
        sizes = [int(size) for size in seeds[0]]
        mean = [statistics.mean(curve[str(size)] for curve in seeds) for size in sizes]
        for axes, scale in ((left, 1.0), (right, second * result["cost_ratios"][arm])):
            axes.plot([scale * size for size in sizes], mean, color=colour, lw=1.6, label=arm)
            for curve in seeds:
                axes.plot([scale * size for size in sizes], list(curve.values()), "o", color=colour, ms=3, alpha=0.6)
    for axes, label in ((left, "bytes of stage 2"), (right, "processor seconds of stage 2")):
        axes.axhline(result["teacher"]["before"], color="#6b7280", lw=0.8, ls=(0, (4, 4)), label="teacher")
        axes.set_xscale("log")
        axes.set_xlabel(label)
        axes.grid(lw=0.4)
        axes.spines[["top", "right"]].set_visible(False)
    left.set_ylabel("joint bits per byte, held out")
    left.legend(frameon=False, fontsize=8)
    save_figure(figure, target)


def main(argv: Sequence[str] | None = None) -> None:
    """Print progress, the tables and the JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--long", action="store_true", help="of twice the bytes: about an hour and a half")
    size.add_argument("--short", action="store_true", help="one seed, shorter runs: about five minutes")
    size.add_argument("--quick", action="store_true", help="few updates: under a minute")
    parser.add_argument("--seeds", help="instead of the form's, as 1,2,3")
    parser.add_argument("--workers", type=int, default=WORKERS, help=f"processes of one thread ({WORKERS})")
    parser.add_argument("--work-dir", type=Path, default=Path("runs/data_efficiency"))
    arguments = parser.parse_args(argv)
    chosen = next((name for name in ("long", "short", "quick") if getattr(arguments, name)), "full")
    name, form = chosen, {"full": FULL, "long": LONG, "short": SHORT, "quick": QUICK}[chosen]
    if arguments.seeds:
        form = replace(form, seeds=[int(seed) for seed in arguments.seeds.split(",")])
    root: Path = arguments.work_dir / name
    shared = Shared(arguments.work_dir / "shared", every=form.every)
    shared.prepare()
    answers = run_jobs(Plan(form, root, shared).jobs(), root / "answers", workers=arguments.workers)
    result = result_of(form, answers)
    (root / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    plot(result, root / "data_efficiency.png")
    print(f"\n{tables(result)}\n\nplot: {root / 'data_efficiency.png'}", flush=True)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
