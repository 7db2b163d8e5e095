#!/usr/bin/env python3
"""What each choice of the curriculum is worth at the demo's size: one seed, one change an arm.

    python benchmarks/ablations.py               # two to four minutes an arm, two at a time: half an hour and more
    python benchmarks/ablations.py --only router # arms whose name holds the word, and theirs to compare
    python benchmarks/ablations.py --quick       # few updates: shows that it runs, its figures mean nothing

Arms train all stages on the same bytes (those of a stage left out go to 2a), or, as the base, start stage 2 from one
stage 1. The last line is one JSON object; the table has each arm's flags. Figures are held-out joint bits per byte:

step path      gold bits as input and label, chunk states come back as in stepping; a student of the official dechunk is
               read with the hard one, since stepping cannot look ahead
router's bits  the same under the router's bits, as input and label
own forward    its own bits as input, its own dechunk, gold bits as label, as the arm was trained; but documents are
               read alone in every arm, also in the one without their mask. Where the dechunk looks ahead, the figure is
               below what stepping gives: the leak

Each arm is compared with the one that differs from it in one thing: most with the base; of those on hard labels the
ones under the router's bits with gold bits and the same dechunk, other dechunks under gold bits with the hard one, and
other learning rates with the preset's; the ones without 1a and 1b with the base whose 2a takes the teacher's own
targets, as they do.
A difference counts where it is above twice its spread over seeds, which is data_efficiency.py's at the size nearest to
the bytes of stage 2 here: that of differences between arms of one stage 1 where both start from it, else the square
root of two times that of one arm.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.curriculum_runs import (
    WORKERS,
    Job,
    Run,
    Shared,
    bytes_per_update,
    iteration_flags,
    joint_bits,
    run_jobs,
)
from benchmarks.curves import PAIRED_SPREAD, SPREAD

STAGE_1 = ("1a", "1b", "1c")
STAGE_1_JOB = "stage1"
UPDATES = {"1a": 450, "1b": 40, "1c": 75, "2a": 500, "2b": 60}
"""Of the base."""
QUICK_UPDATES = {"1a": 2, "1b": 2, "1c": 2, "2a": 2, "2b": 2}
SPREAD_FROM = Path("runs/data_efficiency/full/result.json")
BASE, TEACHERS, HARD_LABELS = "base", "targets of the teacher", "gold bits, hard dechunk"
"""Arms that others are compared with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One change."""

    group: str
    name: str
    flags: tuple[str, ...] = ()
    without: str = ""
    """A stage left out."""
    from_stage1: bool = False
    """Starts from the common stage 1, whose weights the change does not touch."""
    against: str = BASE
    """The arm it is compared with."""
    boundaries: str = "gold"


def _leaks() -> list[Arm]:
    def compared_with(boundaries: str, dechunk: str) -> str:
        if boundaries == "router":
            return f"gold bits, {dechunk} dechunk"
        return BASE if dechunk == "hard" else HARD_LABELS

    return [
        Arm(
            group="byte SFT on hard labels",
            name=f"{boundaries} bits, {dechunk} dechunk",
            flags=("--byte-targets", "hard", "--boundary-source", boundaries, "--dechunk-mode", dechunk),
            from_stage1=dechunk == "hard",  # --load refuses a run of another dechunk mode
            against=compared_with(boundaries, dechunk),
            boundaries=boundaries,
        )
        for boundaries in ("gold", "router")
        for dechunk in ("hard", "causal", "official")
    ]


def _targets() -> list[Arm]:
    group = "targets"
    mixtures = [
        Arm(
            group=group,
            name=f"{alpha} of exact",
            flags=("--byte-targets", "mixed", "--kd-loss-alpha", alpha),
            from_stage1=True,
        )
        for alpha in ("0.25", "0.5", "0.75")
    ]
    temperatures = [
        Arm(group=group, name=f"temperature {value}", flags=("--kd-temperature", value), from_stage1=True)
        for value in ("0.7", "1.5", "2", "4")
    ]
    rates = [
        Arm(
            group=group,
            name=f"{name}, 2a at {rate}",
            flags=(*flags, "--2a.lr", rate),
            from_stage1=True,
            against=against,
        )
        for name, flags, against in (("exact", (), BASE), ("hard", ("--byte-targets", "hard"), HARD_LABELS))
        for rate in ("2.5e-3", "1e-2")
    ]
    return [*mixtures, *temperatures, *rates]


ARMS: Sequence[Arm] = (
    Arm(group="stages", name=BASE, from_stage1=True),
    Arm(
        group="stages",
        name="without 1a",
        without="1a",
        flags=("--2a.exact-targets-from", "teacher"),  # its own would be those of 1b's few updates
        against=TEACHERS,
    ),
    Arm(
        group="stages",
        name="without 1a, its own targets",
        without="1a",
        flags=("--2a.exact-targets-from", "student"),
        against="without 1a",
    ),
    Arm(group="stages", name=TEACHERS, flags=("--2a.exact-targets-from", "teacher"), from_stage1=True),
    Arm(group="stages", name="hard labels in 2b", flags=("--2b.byte-targets", "hard"), from_stage1=True),
    Arm(
        group="stages",
        name="without 1b",
        without="1b",
        flags=("--2a.exact-targets-from", "teacher"),  # nothing else can tell
        against=TEACHERS,
    ),
    Arm(group="router", name="linear router", flags=("--router", "linear")),
    Arm(group="mixers", name="Mamba-2", flags=("--byte-mixer", "mamba2")),
    Arm(group="mixers", name="local attention", flags=("--byte-mixer", "local_attention")),
    Arm(group="document masks", name="no document mask", flags=("--no-document-mask",)),
    Arm(group="alignment layers", name="2 layers", flags=("--align-layers", "2")),
    Arm(group="alignment layers", name="4 layers", flags=("--align-layers", "4")),
    *_targets(),
    *_leaks(),
    Arm(
        group="backbone in 2b",
        name="frozen in 2b",
        flags=("--2b.freeze-backbone", "--2b.backbone-lr", "none"),
        from_stage1=True,
    ),
)
"""The base has the official router, the conv mixer, document masks, no alignment layers, gold bits, hard dechunk, exact
targets and a backbone that trains in 2b."""


def updates_of(arm: Arm, updates: Mapping[str, int]) -> dict[str, int]:
    """Updates of the stages an arm runs; the bytes of one left out go to 2a."""
    chosen = {stage: count for stage, count in updates.items() if not (arm.from_stage1 and stage in STAGE_1)}
    if arm.without:
        left = chosen.pop(arm.without) * bytes_per_update(arm.without)
        chosen["2a"] += round(left / bytes_per_update("2a"))
    return chosen


def train_and_read(run: Run, shared: Shared, arm: Arm, held_out_bytes: int) -> dict[str, Any]:
    """Train an arm and read it in each way."""
    taken = run.train(shared)
    read = partial(joint_bits, run.folder, shared, held_out_bytes)
    return {
        **taken,
        "step_path": read(),
        "router_bits": read(bits="router"),
        "own_forward": read(bits=arm.boundaries, own_forward=True),
        "boundary_f1": json.loads((run.folder / "summary.json").read_text(encoding="utf-8"))["boundary_f1"],
    }


def job_of(arm: Arm, updates: Mapping[str, int], root: Path, shared: Shared, held_out_bytes: int) -> Job:
    """The arm's job."""
    name = f"{arm.group}-{arm.name}".replace(" ", "-").replace(",", "")
    load = root / STAGE_1_JOB if arm.from_stage1 else shared.teacher
    chosen = updates_of(arm, updates)
    measured = ("--summary-bytes", str(held_out_bytes), "--summary-paths", "0")
    run = Run(folder=root / name, load=load, seed=1, flags=(*iteration_flags(chosen), *arm.flags, *measured))
    return Job(
        name=name,
        work=partial(train_and_read, run, shared, arm, held_out_bytes),
        identity={"updates": updates, "flags": run.flags},
        cost=len(chosen),
        after=(STAGE_1_JOB,) if arm.from_stage1 else (),
    )


def stage1_job(updates: Mapping[str, int], root: Path, shared: Shared) -> Job:
    """What the base and others start stage 2 from."""
    flags = tuple(iteration_flags({stage: updates[stage] for stage in STAGE_1}))
    run = Run(folder=root / STAGE_1_JOB, load=shared.teacher, seed=1, flags=flags)
    # before all others, of which many wait for it
    return Job(name=STAGE_1_JOB, work=partial(run.train, shared), identity={"flags": flags}, cost=math.inf)


@dataclass(frozen=True, slots=True)
class Bounds:
    """Above what a difference counts, bits per byte."""

    of_one_stage1: float
    of_two: float

    @classmethod
    def of(cls, result: Mapping[str, Any], size: int) -> Bounds:
        """From what data_efficiency.py found at the size of stage 2 that is nearest to ``size`` bytes."""

        def nearest(spreads: Mapping[str, float]) -> float:
            return spreads[min(spreads, key=lambda other: abs(math.log(int(other) / size)))]

        return cls(2 * nearest(result[PAIRED_SPREAD]), 2 * math.sqrt(2) * nearest(result[SPREAD]))

    def between(self, arm: Arm, other: Arm) -> float:
        """For two arms."""
        return self.of_one_stage1 if arm.from_stage1 and other.from_stage1 else self.of_two


def table(found: Mapping[str, Mapping[str, Any]], bounds: Bounds | None) -> str:
    """Markdown for docs/results.md, a line an arm of which there are figures; differences that count are bold."""
    named = {arm.name: arm for arm in ARMS}
    lines = [
        "| arm | flags | step path | worse by | than | router's bits | own forward | boundary F1 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for arm in ARMS:
        own = found.get(arm.name)
        if own is None:
            continue
        flags = f"`{' '.join(arm.flags)}`" if arm.flags else ""
        other = found.get(arm.against) if arm.against != arm.name else None
        worse = ["", ""]
        if other is not None:
            difference = own["step_path"] - other["step_path"]
            counts = bounds is not None and abs(difference) > bounds.between(arm, named[arm.against])
            worse = [f"**{difference:+.4f}**" if counts else f"{difference:+.4f}", arm.against]
        step_path, *others = (f"{own[name]:.4f}" for name in ("step_path", "router_bits", "own_forward", "boundary_f1"))
        lines.append(f"| {' | '.join([f'{arm.group}: {arm.name}', flags, step_path, *worse, *others])} |")
    note = "not known, run data_efficiency.py"
    if bounds is not None:
        note = f"{bounds.of_one_stage1:.4f} between arms of the common stage 1, {bounds.of_two:.4f} between others"
    return "\n".join([*lines, "", f"A difference counts above twice its spread over seeds: {note}."])


def main(argv: Sequence[str] | None = None) -> None:
    """Print progress, the table and the JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--quick", action="store_true", help="two short updates a stage, an arm a group")
    parser.add_argument(
        "--only", metavar="WORD", help="arms whose group or name holds it, and what they are compared with"
    )
    parser.add_argument("--workers", type=int, default=WORKERS, help=f"processes of one thread ({WORKERS})")
    parser.add_argument("--work-dir", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--spread-from", type=Path, default=SPREAD_FROM, metavar="FILE", help=f"({SPREAD_FROM})")
    arguments = parser.parse_args(argv)
    root: Path = arguments.work_dir / ("quick" if arguments.quick else "full")
    updates, held_out_bytes = (QUICK_UPDATES, 2048) if arguments.quick else (UPDATES, 50_000)
    shared = Shared(arguments.work_dir / "shared")
    shared.prepare()
    word = arguments.only or ""
    chosen = [arm for arm in ARMS if word in f"{arm.group}: {arm.name}"]
    if arguments.quick:
        chosen = list({arm.group: arm for arm in reversed(chosen)}.values())
    arms = [arm for arm in ARMS if arm in chosen or arm.name in {other.against for other in chosen}]
    jobs = {arm.name: job_of(arm, updates, root, shared, held_out_bytes) for arm in arms}
    found = run_jobs([stage1_job(updates, root, shared), *jobs.values()], root / "answers", workers=arguments.workers)
    answers = {name: found[job.name] for name, job in jobs.items()}
    bounds = None
    if arguments.spread_from.exists():
        size = sum(count * bytes_per_update(stage) for stage, count in updates.items() if stage not in STAGE_1)
        result = json.loads(arguments.spread_from.read_text(encoding="utf-8"))
        bounds = Bounds.of(result, size) if PAIRED_SPREAD in result else None  # else of an earlier version
    print(f"\n{table(answers, bounds)}\n", flush=True)
    counts = None if bounds is None else asdict(bounds)
    print(json.dumps({"updates": updates, "counts_above": counts, "arms": answers}))


if __name__ == "__main__":
    main()
