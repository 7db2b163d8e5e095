"""What is installed and what make does, read from the files that say so."""

from __future__ import annotations

import os
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def project() -> dict[str, object]:
    table = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert isinstance(table, dict)
    return table


def dry_run(*words: str) -> str:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    # under `make test VENV=…` the settings of that make would reach this one
    of_make = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "VENV")
    own = {name: value for name, value in os.environ.items() if name not in of_make}
    return subprocess.run(["make", "-n", *words], cwd=ROOT, env=own, capture_output=True, text=True, check=True).stdout


def test_gpu_packages_are_extras_only() -> None:
    base = " ".join(map(str, project()["dependencies"]))  # type: ignore[call-overload]
    assert not [name for name in ("transformer", "mamba", "apex", "triton", "flash") if name in base]


def test_nvidias_apex_is_never_asked_of_an_index() -> None:
    extras = project()["optional-dependencies"]
    assert isinstance(extras, dict)
    assert set(extras) == {"test", "hf", "eval", "te", "mamba", "wandb"}
    assert not [name for names in extras.values() for name in names if name.startswith("apex")]


def test_make_demo_runs_the_main_job_with_flags() -> None:
    plain, fresh = dry_run("demo"), dry_run("demo", "FRESH=1", "ARGS=--smoke")
    assert ".venv/bin/torchrun examples/pretrain_byte_kd.sh" in plain
    assert "--fresh" not in plain and "PET_NPROC_PER_NODE=3" in dry_run("demo", "RANKS=3")
    assert "--fresh --smoke" in fresh
    # its floors are those of the demo as it stands
    assert plain.splitlines()[-1] == ".venv/bin/python scripts/check_demo.py runs/tiny"
    assert "check_demo" not in fresh


def test_ci_runs_the_tests_of_make() -> None:
    assert "make test" in (ROOT / ".ci/run").read_text(encoding="utf-8")
    assert "pytest" in dry_run("test")
