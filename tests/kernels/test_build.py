"""The kernels' build with nvcc, where it is, and what ptxas says of it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megabyte_distill.kernels import build
from megabyte_distill.kernels.__main__ import main

ROOT = Path(__file__).resolve().parents[2]
PTXAS = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN3mbk9add_tilesEPKfPfll' for 'sm_80'
ptxas info    : Function properties for _ZN3mbk9add_tilesEPKfPfll
    0 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 28 registers, used 0 barriers, 384 bytes cmem[0]
ptxas info    : Compiling entry function '_ZN3mbk9add_tilesEPKfPfll' for 'sm_90a'
ptxas info    : Function properties for _ZN3mbk9add_tilesEPKfPfll
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 30 registers, used 0 barriers
"""


def test_registers_and_spills_are_read_from_ptxas() -> None:
    found = [(usage.architecture, usage.registers, usage.spilled_bytes) for usage in build._usages(PTXAS)]
    assert found == [("sm_80", 28, 12), ("sm_90a", 30, 0)]


def test_the_name_of_a_library_follows_its_sources(tmp_path: Path) -> None:
    shutil.copytree(build.SOURCES, tmp_path / "csrc")
    before = build.library_path("cuda", sources=tmp_path / "csrc")
    assert before == build.library_path("cuda")
    with open(tmp_path / "csrc" / "kernel.h", "a", encoding="utf-8") as header:
        header.write("// changed\n")
    assert build.library_path("cuda", sources=tmp_path / "csrc") != before


@pytest.mark.parametrize("target", ["cpu", "step"])
def test_gpus_are_refused_for_what_runs_on_a_cpu(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", target, "--arch", "sm_90a"]) == 2
    output = capsys.readouterr()
    assert output.err.startswith("error: --arch: is about GPUs, and ") and not output.out


def test_what_cannot_be_built_is_an_error_and_no_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = build.KernelUsage(kernel="wide", architecture="sm_90a", registers=255, spilled_bytes=8)
    monkeypatch.setattr(build, "build_cuda", lambda architectures: [usage])
    monkeypatch.setattr(build, "library_path", lambda kind: tmp_path / kind)
    assert main(["build", "--arch", "sm_90a"]) == 1
    assert capsys.readouterr().err == "error: these kernels spill registers to memory: wide\n"
    monkeypatch.undo()
    monkeypatch.setattr(build, "find_nvcc", lambda: None)
    assert main(["build"]) == 1
    assert capsys.readouterr().err.startswith("error: nvcc was not found")
    with pytest.raises(SystemExit):
        main(["build", "--help"])
    assert "1 something could not be built" in capsys.readouterr().out


def test_a_compiler_that_fails_is_quoted(tmp_path: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("needs g++; run on a machine that has it")
    (tmp_path / "wrong.cu").write_text("this is no C++\n")
    with pytest.raises(build.BuildError, match=r"wrong\.cu"):
        build.build_cpu(tmp_path / "lib", sources=tmp_path)
    assert list((tmp_path / "lib").iterdir()) == []


def test_nvcc_builds_a_library_without_spills(tmp_path: Path) -> None:
    if build.find_nvcc() is None:
        pytest.skip("nvcc is not here; run `make kernels` on a machine that has it")
    for name in ("kernel.h", "library.cu", "chunk_index.cu"):  # one small source: `make kernels` takes them all
        shutil.copy(build.SOURCES / name, tmp_path / name)
    usages = build.build_cuda(tmp_path / "lib", architectures=("sm_80", "sm_90a"), sources=tmp_path)
    assert {usage.architecture for usage in usages} == {"sm_80", "sm_90a"}
    assert all(usage.registers > 0 and usage.spilled_bytes == 0 for usage in usages)
    assert build.library_path("cuda", tmp_path / "lib", tmp_path).is_file()


def test_an_installation_without_kernels_is_complete(tmp_path: Path) -> None:
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns("lib", "__pycache__")
    shutil.copytree(ROOT / "megabyte_distill", source / "megabyte_distill", ignore=ignored)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "--no-index"]
    done = subprocess.run(
        [*command, "--target", str(tmp_path / "site"), str(source)],
        env={**os.environ, "MEGABYTE_DISTILL_NO_KERNELS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    kernels = tmp_path / "site" / "megabyte_distill" / "kernels"
    assert (kernels / "csrc" / "kernel.h").is_file() and not (kernels / "lib").exists()
