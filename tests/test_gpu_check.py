"""The check for a GPU machine fails where something is wrong, and leaves no process behind; its numbers need a GPU."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def gpu_check(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    import gpu_check  # type: ignore[import-not-found]

    yield gpu_check
    for name in ("gpu_check", "kernel_cases"):
        sys.modules.pop(name, None)


def test_whatever_went_wrong_is_named(gpu_check: ModuleType) -> None:
    ops = {"F1": "right", "F2": ["bf16: gradient 1: error 3"]}
    timing = {"copy_rate": 4e12, "F3": "RuntimeError: out of memory", "F4": {"floor_ms": (1.0, 2.0)}}
    training = {"fused": {"exit_code": 124}, "reference": {"exit_code": 0}}
    assert gpu_check.broken_in(ops) == ["F2"]
    assert gpu_check.broken_in(timing) == ["F3"]
    assert gpu_check.broken_in(training) == ["fused"]
    assert gpu_check.broken_in({"gpu_training.py": {"device": "a card", "2b_fused": {"seconds": 1.0}}}) == []


def test_a_benchmark_of_its_own_is_named_where_it_fails(gpu_check: ModuleType) -> None:
    check = gpu_check.Check(1.0, {})
    found = gpu_check.benchmark_of_its_own("no_such_benchmark.py", check)
    assert gpu_check.broken_in(found) == ["no_such_benchmark.py"]


def test_a_command_that_takes_too_long_ends_with_all_it_started(gpu_check: ModuleType, tmp_path: Path) -> None:
    started = time.monotonic()
    output, code = gpu_check.run_limited(["bash", "-c", f"sleep 60 & echo $! > {tmp_path}/pid; echo begun; wait"], 2.0)
    assert (output, code) == ("begun\n", 124) and time.monotonic() - started < 30
    # killed, perhaps not yet collected by whoever takes orphans
    state = Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}/stat")
    if not os.path.isdir("/proc/self"):
        pytest.skip("needs /proc to see processes; run on Linux")
    for _ in range(50):
        if not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return
        time.sleep(0.1)
    raise AssertionError("the command's child is still running")


def test_the_exit_code_of_a_command_is_kept(gpu_check: ModuleType) -> None:
    assert gpu_check.run_limited(["bash", "-c", "echo said; exit 3"], 30.0) == ("said\n", 3)


def test_operators_are_chosen_by_how_their_names_begin(gpu_check: ModuleType) -> None:
    assert {name[:2] for name in gpu_check.cases_named("F1,F4")} == {"F1", "F4"}
    assert len(gpu_check.cases_named("")) > 14
    with pytest.raises(ValueError, match="got f4, expected beginnings of F1 table, "):
        gpu_check.cases_named("F1,f4")
