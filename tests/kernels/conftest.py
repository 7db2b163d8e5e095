"""The kernel library for the CPU, built once a session, and the fused operators in place for a test that asks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from megabyte_distill.config.training import KernelMode
from megabyte_distill.kernels import build, dispatch
from megabyte_distill.kernels.library import Library, load
from megabyte_distill.kernels.selection import choose


@pytest.fixture(scope="session")
def cpu_library() -> Library:
    """The CPU build of these very sources."""
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
    choose(KernelMode.FUSED, torch.device("cpu"))
    torch.use_deterministic_algorithms(True)
    try:
        yield cpu_library
    finally:
        torch.use_deterministic_algorithms(False)
        dispatch.install({})
