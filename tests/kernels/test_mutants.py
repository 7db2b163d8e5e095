"""Every seeded bug is noticed: the tests of the kernels can fail."""

from __future__ import annotations

import faulthandler
import os
import traceback
from pathlib import Path

import pytest

from megabyte_distill.kernels import build, library
from megabyte_distill.kernels.library import Library
from tests.kernels import chunk_mutants, mutants
from tests.kernels.mutants import Mutant, mutated_sources

MUTANTS = {**mutants.MUTANTS, **chunk_mutants.MUTANTS}
FIRST_OF_SOURCE = {mutant.source: name for name, mutant in reversed(MUTANTS.items())}.values()
"""One a source file is tried in every run; each is a build of its own."""
NAMES = [name if name in FIRST_OF_SOURCE else pytest.param(name, marks=pytest.mark.slow) for name in MUTANTS]


BROKEN = 3
"""Exit code of a check that fails by anything else than an assertion or what the kernel reports."""


def survives(mutant: Mutant, path: Path) -> bool:
    """Whether the mutant's check passes; in a process of its own, which a bug may bring down."""
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        code = BROKEN
        try:
            mutant.check(library.load("cpu", path))
            code = 0
        except (AssertionError, RuntimeError):
            code = 1
        finally:  # this process must never go on as a second pytest
            traceback.print_exc(limit=1)
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    assert status != BROKEN << 8, "the check did not run: it, and not the bug, is wrong"
    return status == 0


@pytest.mark.parametrize("name", NAMES)
def test_a_seeded_bug_is_noticed(fused: Library, tmp_path: Path, name: str) -> None:
    mutant = MUTANTS[name]
    sources = mutated_sources(mutant, tmp_path / "csrc")
    assert not survives(mutant, build.build_cpu(tmp_path / "lib", sources=sources, extra_flags=("-O0",)))


@pytest.mark.parametrize("name", {mutant.check: name for name, mutant in MUTANTS.items()}.values())
def test_without_the_bug_the_same_check_passes(fused: Library, name: str) -> None:
    assert survives(MUTANTS[name], fused.path)
