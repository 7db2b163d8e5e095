#!/usr/bin/env python3
"""What each step of the curriculum buys: the student against a byte model from scratch, without 1a, without 1b.

    python benchmarks/controls.py                 # 3.1 MB of training bytes a run, three seeds: hours on two cores
    python benchmarks/controls.py --quick         # under a minute: shows that it runs, its figures mean nothing

All arms see the same number of bytes in training: those of a step left out go to 2a, the model from scratch
spends all of them in 2b (everything trains, random backbone of the same size, updates as small as 2a's). The budget is
smaller than the demo's, and more of it goes to 2a: the measure has no use for a good router or token head. The
measure is joint bits per byte on the held-out works. A difference counts where it is above twice the spread
(standard deviation over seeds, pooled). The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.curriculum_runs import Run, Shared, bytes_per_update, iteration_flags
from benchmarks.curves import pooled
from megabyte_distill.config import CURRICULUM, parse_arguments

ARMS = ("student", "without 1a", "without 1b", "from scratch")
SCRATCH_FLAGS = ("--2b.lr", "3e-3", "--2b.backbone-lr", "3e-3", "--2b.byte-targets", "hard")
"""The teacher's own learning rate, which a model that starts from nothing wants; and no teacher to learn from."""


UPDATES = {"1a": 450, "1b": 30, "1c": 50, "2a": 850, "2b": 50}
"""Of each stage of the student."""


def iterations(scale: float) -> dict[str, int]:
    """Updates of each stage, scaled."""
    return {name: max(2, round(scale * UPDATES[name])) for name in CURRICULUM}


def arm_flags(arm: str, updates: Mapping[str, int]) -> list[str]:
    """Command line of an arm; every arm spends the same bytes."""
    chosen = dict(updates)
    if arm == "from scratch":
        total = sum(count * bytes_per_update(name) for name, count in updates.items())
        size = parse_arguments(["--mock-data"]).stages["2a"]
        flags = ["--stages", "2b", "--2b.seq-length", str(size.seq_length)]
        return [*flags, "--2b.train-iters", str(total // size.bytes_per_update), *SCRATCH_FLAGS]
    if arm.startswith("without"):
        left_out = arm.removeprefix("without ")
        chosen["2a"] += round(chosen.pop(left_out) * bytes_per_update(left_out) / bytes_per_update("2a"))
    return iteration_flags(chosen)


def random_teacher(teacher: Path, folder: Path, seed: int) -> None:
    """A teacher folder with the same model and tokenizer, and weights that were never trained."""
    import torch

    from megabyte_distill.conversion.model_config import read_model_config
    from megabyte_distill.conversion.teacher_folder import save_teacher
    from megabyte_distill.conversion.tokenizer_files import TOKEN_BYTES_FILE, TOKENIZER_FOLDER
    from megabyte_distill.data.token_bytes import TokenBytes
    from megabyte_distill.model.backbone import Backbone
    from megabyte_distill.parallel.process_groups import world

    if folder.exists():
        return
    with world(seed=seed):
        torch.manual_seed(seed)
        table = TokenBytes.load(teacher / TOKENIZER_FOLDER / TOKEN_BYTES_FILE)
        save_teacher(folder, Backbone(read_model_config(teacher).backbone), table, teacher / TOKENIZER_FOLDER)


def run_arm(arm: str, seed: int, args: argparse.Namespace) -> dict[str, float]:
    """Train one arm (or take what an earlier call finished) and return its summary."""
    shared = Shared(args.work_dir / "shared")
    shared.prepare()
    load = shared.teacher
    if arm == "from scratch":
        load = args.work_dir / f"random-teacher-{seed}"
        random_teacher(shared.teacher, load, seed)
    flags = [
        # in every arm alike: behind no 1b the student's backbone tells nothing
        *([] if arm == "from scratch" else ["--2a.exact-targets-from", "teacher"]),
        *("--summary-bytes", str(args.summary_bytes), "--summary-paths", "0"),
        *arm_flags(arm, iterations(args.scale)),
        *(["--seq-length", "512"] if args.quick else []),
    ]
    run = Run(folder=args.work_dir / f"{arm.replace(' ', '-')}-{seed}", load=load, seed=seed, flags=tuple(flags))
    run.train(shared)
    return json.loads((run.folder / "summary.json").read_text())


def verdict(student: list[float], other: list[float]) -> dict[str, float | bool]:
    """How much worse the other arm is, and whether that is above twice the pooled spread."""
    difference = statistics.mean(other) - statistics.mean(student)
    if len(student) < 2:
        return {"worse_by": difference, "spread": math.nan, "above_twice_the_spread": False}
    spread = pooled([student, other])
    return {"worse_by": difference, "spread": spread, "above_twice_the_spread": difference > 2 * spread}


def compare() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--scale", type=float, default=1.0, help="share of the 3.1 MB of training bytes (default 1)")
    parser.add_argument("--seeds", default="1,2,3", help="default 1,2,3")
    parser.add_argument("--work-dir", type=Path, default=Path("runs/controls"))
    parser.add_argument("--summary-bytes", type=int, default=100_000, help="held-out bytes (default 100000)")
    parser.add_argument("--quick", action="store_true", help="two short updates a stage, one seed")
    args = parser.parse_args()
    if args.quick:
        args.scale, args.seeds, args.summary_bytes = 0.0, "1", 2048
        args.work_dir = args.work_dir / "quick"
    seeds = [int(seed) for seed in args.seeds.split(",")]
    scores: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for seed in seeds:
        for arm in ARMS:
            scores[arm].append(run_arm(arm, seed, args)["student_bits_per_byte"])
            print(f"=== {arm}, seed {seed}: {scores[arm][-1]:.4f} bits per byte", flush=True)
    for arm in ARMS:
        print(f"{arm:<14} {' '.join(f'{x:.4f}' for x in scores[arm])}  mean {statistics.mean(scores[arm]):.4f}")
    result = {
        "updates": iterations(args.scale),
        "seeds": seeds,
        "joint_bits_per_byte": scores,
        "against_student": {arm: verdict(scores["student"], scores[arm]) for arm in ARMS[1:]},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    compare()
