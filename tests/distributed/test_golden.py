"""The curriculum's numbers, kept in tests/golden: a refactor must not move them, on one rank or on TP2 x PP2.

Where they change on purpose, write them anew and give the reason in the commit::

    python -m tests.distributed.test_golden
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from pathlib import Path

import pytest

from tests.pretrain.job import SCRIPT, Job, make_job, metrics, run_command, torchrun

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "curriculum.json"
FLAGS = (
    "--global-batch-size", "4", "--2a.byte-targets", "exact", "--2a.exact-targets-from", "teacher",
    "--2b.boundary-source", "router", "--2b.byte-targets", "mixed", "--dechunk-mode", "causal",
)  # fmt: skip
TOLERANCE = 1e-4
"""Rounding differs between machines and versions of torch; what a change of the mathematics moves is far more."""


def numbers(run: Path) -> dict[str, float]:
    """Every recorded value by stage, iteration and name."""
    return {f"{stage} {iteration} {name}": value for (stage, iteration, name), value in metrics(run).items()}


def assert_golden(run: Path) -> None:
    wanted, got = json.loads(GOLDEN.read_text()), numbers(run)
    assert got.keys() == wanted.keys() and len(wanted) > 100
    moved = {
        name: (got[name], value)
        for name, value in wanted.items()
        if not math.isclose(got[name], value, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
    }
    assert not moved, moved


def test_one_rank(job: Job, tmp_path: Path) -> None:
    assert job.run(tmp_path / "run", *FLAGS) == 0
    assert_golden(tmp_path / "run")


def test_two_tensor_parallel_ranks_on_two_pipeline_stages(job: Job, tmp_path: Path) -> None:
    cut = ("--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2", "--sequence-parallel")
    # processes of their own: each orders sets by another seed of its hashes
    command = torchrun(str(SCRIPT), *job.flags(tmp_path / "run", *FLAGS, *cut), processes=4)
    done = run_command(command, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    assert_golden(tmp_path / "run")


def test_a_moved_number_is_seen(tmp_path: Path) -> None:
    """The comparison itself: one value off by 0.1 % fails it."""
    records: dict[tuple[str, int], dict[str, float | str]] = {}
    for name, value in json.loads(GOLDEN.read_text()).items():
        stage, iteration, title = name.split(" ", 2)
        records.setdefault((stage, int(iteration)), {"stage": stage, "iteration": int(iteration)})[title] = value

    def write() -> None:
        (tmp_path / "metrics.jsonl").write_text("\n".join(json.dumps(record) for record in records.values()))

    write()
    assert_golden(tmp_path)
    records[("2b", 4)]["byte ce"] = float(records[("2b", 4)]["byte ce"]) * 1.001
    write()
    with pytest.raises(AssertionError, match="2b 4 byte ce"):
        assert_golden(tmp_path)


def write_golden() -> None:
    """Run on one rank and keep the numbers."""
    with tempfile.TemporaryDirectory() as folder:
        job, run = make_job(Path(folder) / "job"), Path(folder) / "run"
        assert job.run(run, *FLAGS) == 0
        GOLDEN.write_text(json.dumps(numbers(run), indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    sys.exit(write_golden())
