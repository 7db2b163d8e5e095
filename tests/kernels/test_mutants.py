"""Every seeded bug is noticed: the tests of the kernels can fail."""

from __future__ import annotations

import faulthandler
import os
import traceback
from pathlib import Path

import pytest

from megabyte_distill.kernels import build, library
from megabyte_distill.kernels.library import Library
from tests.kernels.mutants import MUTANTS, Mutant, mutated_sources


def survives(mutant: Mutant, path: Path) -> bool:
    """Whether the mutant's check passes; in a process of its own, which a bug may bring down."""
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        try:
            mutant.check(library.load("cpu", path))
        except (AssertionError, RuntimeError):
            traceback.print_exc(limit=1)
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("name", MUTANTS)
def test_a_seeded_bug_is_noticed(fused: Library, tmp_path: Path, name: str) -> None:
    mutant = MUTANTS[name]
    sources = mutated_sources(mutant, tmp_path / "csrc")
    assert not survives(mutant, build.build_cpu(tmp_path / "lib", sources=sources, extra_flags=("-O0",)))


@pytest.mark.parametrize("name", {mutant.check: name for name, mutant in MUTANTS.items()}.values())
def test_without_the_bug_the_same_check_passes(fused: Library, name: str) -> None:
    assert survives(MUTANTS[name], fused.path)
