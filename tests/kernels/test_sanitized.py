"""The CPU build under the address and undefined-behaviour sanitizers, in a process of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megabyte_distill.kernels import build
from tests.kernels.mutants import DECHUNK, Mutant, dechunk_agrees, mutated_sources

FLAGS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g1", "-O0")
ROOT = Path(__file__).resolve().parent.parent.parent
CASES = "(equals and (ragged or 63)) or no_bytes or outside"
"""Names of the tests that run there: every operator and mode, ragged, in both dtypes."""
ONE_ROW_TOO_FAR = Mutant(
    source=DECHUNK,
    file="dechunk_forward.h",
    old="      if (from + r < end) ahead",
    new="      if (from + r <= end) ahead",
    check=dechunk_agrees,  # type: ignore[arg-type]
)
"""Harmless to every result: only a sanitizer sees it."""


def sanitizer_runtime(name: str) -> str:
    found = (
        shutil.which("g++")
        and subprocess.run(
            ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
    )
    if not found or not os.path.isabs(found):
        pytest.skip(f"g++ has no {name} here; run on a machine where it has (package libasan)")
    return found


def run_tests(library: Path, selection: str) -> subprocess.CompletedProcess[str]:
    runtimes = " ".join(sanitizer_runtime(name) for name in ("libasan.so", "libubsan.so"))
    environment = {
        **os.environ,
        "LD_PRELOAD": runtimes,
        "ASAN_OPTIONS": "detect_leaks=0",
        "KERNEL_TEST_LIBRARY": str(library),
        "PYTHONPATH": str(ROOT),
    }
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-s",
        "-p",
        "no:cacheprovider",
        str(ROOT / "tests" / "kernels"),
    ]
    return subprocess.run([*command, "-k", selection], env=environment, capture_output=True, text=True, timeout=280)


def test_no_access_is_out_of_bounds_and_nothing_undefined(tmp_path: Path) -> None:
    done = run_tests(build.build_cpu(tmp_path, extra_flags=FLAGS), f"test_fused and ({CASES})")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert " passed" in done.stdout


@pytest.mark.slow
def test_a_read_of_one_row_too_many_is_seen(tmp_path: Path) -> None:
    library = build.build_cpu(
        tmp_path / "lib", sources=mutated_sources(ONE_ROW_TOO_FAR, tmp_path / "csrc"), extra_flags=FLAGS
    )
    done = run_tests(library, "test_fused_dechunk and equals_the_loop and causal")
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr, done.stdout[-2000:] + done.stderr[-2000:]
