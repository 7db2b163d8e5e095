"""The benchmark of what goes between ranks: its least is a bound, and what is above it is said."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

PATH = Path(__file__).resolve().parents[2] / "benchmarks" / "pipeline_bytes.py"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    specification = importlib.util.spec_from_file_location("pipeline_bytes", PATH)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["pipeline_bytes"] = module
    specification.loader.exec_module(module)
    return module


def test_nothing_is_below_the_least_and_little_above_it(
    benchmark: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    benchmark.main(["--quick"])
    entries: list[dict[str, Any]] = json.loads(capsys.readouterr().out.splitlines()[-1])["entries"]
    found = {entry["stage"]: entry for entry in entries}
    assert list(found) == ["1a", "1b", "1c", "2a", "2b"]
    for entry in entries:
        assert min(entry["sent"]) >= entry["least_sent"] and min(entry["returned"]) >= entry["least_returned"]
        assert entry["least_gradients"] <= entry["gradients"] < 1.001 * entry["least_gradients"], "padding alone"
    for stage in ("1a", "1c"):
        assert max(found[stage]["sent"] + found[stage]["returned"]) <= 4, "one loss"
    # the bucket of these short rows adds a tenth to their chunks
    assert max(found["1b"]["sent"]) < 1.11 * found["1b"]["least_sent"]
    for stage in ("2a", "2b"):
        assert max(found[stage]["sent"]) < 1.03 * found[stage]["least_sent"]
    assert max(found["2b"]["returned"]) < 1.03 * found["2b"]["least_returned"]


def test_virtual_stages_pass_the_same_payload_over_more_boundaries(
    benchmark: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--quick", "--stages", "1b", "--global-batch-size", "32")
    entries = []
    for further in ((), ("--num-virtual-stages-per-pipeline-rank", "2")):
        benchmark.main([*flags, *further])
        entries += json.loads(capsys.readouterr().out.splitlines()[-1])["entries"]
    whole, cut = entries
    for name in ("sent", "returned"):
        assert (len(whole[name]), len(cut[name])) == (3, 7) and set(whole[name]) == set(cut[name])
    assert (cut["gradients"], cut["least_gradients"]) == (whole["gradients"], whole["least_gradients"])
