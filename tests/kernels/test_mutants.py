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

PASSED, FAILED, BROKEN = 0, 1, 2
OUTCOMES = {PASSED: "passed", FAILED: "noticed", BROKEN: "the check itself is broken"}


def outcome(mutant: Mutant, path: Path) -> str:
    """What the mutant's check says, in a process of its own, which a bug may bring down."""
    child = os.fork()
    if child == 0:
        code = BROKEN
        try:
            faulthandler.disable()
            mutant.check(library.load("cpu", path))
            code = PASSED
        except (AssertionError, RuntimeError):
            traceback.print_exc(limit=1)
            code = FAILED
        finally:
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    return "noticed" if os.WIFSIGNALED(status) else OUTCOMES[os.WEXITSTATUS(status)]


@pytest.mark.parametrize("name", MUTANTS)
def test_a_seeded_bug_is_noticed(fused: Library, tmp_path: Path, name: str) -> None:
    mutant = MUTANTS[name]
    sources = mutated_sources(mutant, tmp_path / "csrc")
    path = build.build_cpu(tmp_path / "lib", sources=sources, extra_flags=("-O0",))
    assert outcome(mutant, path) == "noticed"


@pytest.mark.parametrize("name", {mutant.check: name for name, mutant in MUTANTS.items()}.values())
def test_without_the_bug_the_same_check_passes(fused: Library, name: str) -> None:
    assert outcome(MUTANTS[name], fused.path) == "passed"
