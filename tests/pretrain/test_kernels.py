"""The curriculum with the fused kernels (their CPU build) and with torch's operators."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from megabyte_distill.config.model import DechunkMode
from megabyte_distill.kernels import dispatch
from megabyte_distill.kernels.library import Library, calls
from tests.kernels.conftest import cpu_library
from tests.pretrain.job import STAGES, TIMES, Job, metrics

__all__ = ["cpu_library"]

TOLERANCE = 2e-4
"""Relative, of every loss and measure: rounding in another order, carried through four updates a stage."""


@pytest.mark.parametrize("mode", [DechunkMode.HARD, DechunkMode.CAUSAL])
def test_fused_and_reference_train_alike(job: Job, cpu_library: Library, tmp_path: Path, mode: DechunkMode) -> None:
    found = {}
    for kernels in ("fused", "reference"):
        calls.clear()
        code = job.run(tmp_path / kernels, "--kernels", kernels, "--dechunk-mode", mode.value)
        dispatch.install({})
        assert code == 0
        assert (calls["dechunk_backward"] > 0) is (kernels == "fused")
        found[kernels] = metrics(tmp_path / kernels)
    assert found["fused"].keys() == found["reference"].keys()
    assert {stage for stage, _, _ in found["fused"]} == set(STAGES)
    for key, value in found["reference"].items():
        if key[2] not in TIMES:
            assert math.isclose(found["fused"][key], value, rel_tol=TOLERANCE, abs_tol=1e-6), (key, value)


def test_the_log_names_the_path_once(job: Job, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert job.run(tmp_path / "run", "--kernels", "reference", "--stages", "1a") == 0
    assert capfd.readouterr().out.count("kernels: torch reference (--kernels reference)") == 1
