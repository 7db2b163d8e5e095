"""Tensor parallelism: the curriculum on two ranks that share each layer gives the losses and weights of one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed.test_data_parallel import FLAGS, assert_close
from tests.pretrain.job import SCRIPT, STAGES, Job, run_as_ranks

TENSOR = ("--tensor-model-parallel-size", "2")
SIZES = ("--micro-batch-size", "2")


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--byte-mixer", "mamba2", "--mamba-head-dim", "16"),
        # with the official router: test_router.py has the linear one, which an untrained encoder conditions badly
        ("--byte-mixer", "local_attention", "--byte-attention-head-dim", "16", "--stages", "1c,2b"),
        ("--2a.byte-targets", "exact", "--2b.boundary-source", "router", "--dechunk-mode", "causal"),
        ("--sequence-parallel", "--2b.boundary-source", "router"),
    ],
)
def test_two_ranks_that_share_layers_give_the_losses_of_one(job: Job, tmp_path: Path, flags: tuple[str, ...]) -> None:
    alone, run = tmp_path / "alone", tmp_path / "run"
    assert job.run(alone, *FLAGS, *SIZES, *(flag for flag in flags if flag != "--sequence-parallel")) == 0
    done = run_as_ranks(str(SCRIPT), *job.flags(run, *FLAGS, *SIZES, *flags, *TENSOR), processes=2)
    assert done.returncode == 0, done.stderr
    assert_close(run, alone, STAGES if "--stages" not in flags else ("1c", "2b"))


def test_two_copies_of_two_ranks_give_the_losses_of_one_process(job: Job, tmp_path: Path) -> None:
    alone, run = tmp_path / "alone", tmp_path / "run"
    stages = ("--stages", "1b,2b", "--summary-bytes", "1500")
    assert job.run(alone, *FLAGS, *SIZES, *stages) == 0
    flags = job.flags(run, *FLAGS, *SIZES, *stages, *TENSOR, "--use-distributed-optimizer")
    done = run_as_ranks(str(SCRIPT), *flags, processes=4, timeout=280)
    assert done.returncode == 0, done.stderr
    assert_close(run, alone, ["1b", "2b"])
    both = [json.loads((path / "summary.json").read_text())["student_bits_per_byte"] for path in (run, alone)]
    assert both[0] == pytest.approx(both[1], abs=1e-4)


def test_the_summary_is_that_of_one_process(job: Job, tmp_path: Path) -> None:
    summaries = []
    for name, words, processes in (("two", TENSOR, 2), ("one", (), 1)):
        flags = job.flags(tmp_path / name, *FLAGS, *words, "--summary-bytes", "1500", "--stages", "2a")
        done = run_as_ranks(str(SCRIPT), *flags, processes=processes, timeout=120)
        assert done.returncode == 0, done.stderr
        summaries.append(json.loads((tmp_path / name / "summary.json").read_text()))
    two, one = ({k: v for k, v in s.items() if isinstance(v, float) and k != "seconds"} for s in summaries)
    assert two.keys() == one.keys() and len(one) > 10
    assert two == pytest.approx(one, abs=1e-4, nan_ok=True)


def test_a_run_goes_on_with_another_number_of_ranks(job: Job, tmp_path: Path) -> None:
    """Weights and optimizer are read whole, whatever wrote them."""
    straight, changed = tmp_path / "straight", tmp_path / "changed"
    stage = ("--stages", "2b", *FLAGS, *SIZES)
    assert job.run(straight, *stage) == 0
    first = job.flags(changed, *stage, "--exit-interval", "2", *TENSOR)
    done = run_as_ranks(str(SCRIPT), *first, processes=2)
    assert done.returncode == 0, done.stderr
    assert job.run(changed, *stage) == 0
    assert_close(changed, straight, ["2b"])


def test_sizes_that_do_not_divide_are_refused(job: Job, tmp_path: Path) -> None:
    flags = job.flags(tmp_path / "run", "--encoder-ffn-hidden-size", "33", *TENSOR)
    done = run_as_ranks(str(SCRIPT), *flags, processes=2)
    assert done.returncode != 0
    assert "a width of 33 in the byte side cannot be split over --tensor-model-parallel-size 2" in done.stderr


def test_ranks_that_cannot_be_cut_are_refused(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert job.run(tmp_path / "run", *TENSOR) == 2
    assert "1 ranks cannot be cut into groups of --tensor-model-parallel-size 2" in capsys.readouterr().err
