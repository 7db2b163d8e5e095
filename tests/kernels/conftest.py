"""The kernel library for the CPU, built once a session, and the fused operators in place for a test that asks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megabyte_distill.kernels import build, dispatch
from megabyte_distill.kernels.fused import FUSED_OPS
from megabyte_distill.kernels.library import Library, load


@pytest.fixture(scope="session")
def cpu_library() -> Library:
    """The CPU build of these very sources, or the one that a test of this folder names to a process of its own."""
    if given := os.environ.get("KERNEL_TEST_LIBRARY"):
        return load("cpu", Path(given))
    try:
        return load("cpu")
    except ValueError:  # none yet, or one of other sources
        pass
    try:
        build.build_cpu()
    except build.BuildError as error:
        if "not found" in str(error):
            pytest.skip(f"the kernels' CPU build needs a compiler: {error}; run on a machine that has g++")
        raise
    return load("cpu")


@pytest.fixture
def fused(cpu_library: Library) -> Iterator[Library]:
    """Every operator that has a fused form runs it, and what torch.empty returns is NaN."""
    dispatch.install(FUSED_OPS, device="cpu", strict=True)
    torch.use_deterministic_algorithms(True)
    try:
        yield cpu_library
    finally:
        torch.use_deterministic_algorithms(False)
        dispatch.install({})
