"""Compiles csrc/*.cu into one library for CUDA with nvcc, and into one for the CPU with g++ for tests.

A third library, from cpu_step/, is the engine's step on a CPU. Needs neither torch nor the network. The libraries stand
in kernels/lib/, a hash of their sources in their names, so one of other sources is never loaded. Nothing is built
behind a user's back: `make kernels` does it, `pip install .` does it where nvcc is there, and so does
``python -m megabyte_distill.kernels build``.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

SOURCES = Path(__file__).parent / "csrc"
STEP_SOURCES = Path(__file__).parent / "cpu_step"
LIBRARIES = Path(__file__).parent / "lib"
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100")
"""Binaries for Ampere, Hopper and Blackwell; other GPUs compile the PTX of compute_80 when they load it."""
_NVCC_FLAGS = ("-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC,-fvisibility=hidden")
_CPU_FLAGS = ("-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing", "-x", "c++")
_STEP_FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-fopenmp", "-fPIC", "-fvisibility=hidden")
_ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")


class BuildError(RuntimeError):
    """A compiler is missing or did not succeed; the message holds what it said."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelUsage:
    """What ptxas reports of one kernel on one architecture."""

    kernel: str
    architecture: str
    registers: int
    spilled_bytes: int


def library_path(kind: str, folder: Path = LIBRARIES, sources: Path = SOURCES) -> Path:
    """Where the library for ``cuda`` or ``cpu`` stands that was made from these sources."""
    return folder / f"{_stem(kind)}{sources_hash(sources)}.so"


def _stem(kind: str) -> str:
    return f"libmegabyte_kernels_{kind}_"


def sources_hash(sources: Path = SOURCES) -> str:
    """Identity of the kernel sources: 16 hex digits over names and contents of csrc."""
    digest = hashlib.sha256()
    for path in sorted([*sources.glob("*.cu"), *sources.glob("*.h")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def find_nvcc() -> str | None:
    """nvcc of CUDA_HOME, of PATH, or of /usr/local/cuda; None where there is none."""
    home = os.environ.get("CUDA_HOME")
    candidates = [f"{home}/bin/nvcc"] if home else []
    candidates += [found] if (found := shutil.which("nvcc")) else []
    candidates.append("/usr/local/cuda/bin/nvcc")
    return next((path for path in candidates if os.access(path, os.X_OK)), None)


def known_architectures(nvcc: str) -> tuple[str, ...]:
    """Those of :data:`ARCHITECTURES` that this nvcc can compile for."""
    listed = _run([nvcc, "--list-gpu-code"]).split()
    return tuple(arch for arch in ARCHITECTURES if arch.rstrip("a") in listed)


def build_cuda(
    folder: Path = LIBRARIES, architectures: Sequence[str] = (), *, sources: Path = SOURCES
) -> list[KernelUsage]:
    """Build the CUDA library into ``folder``; returns what each kernel uses.

    Raises:
        BuildError: without nvcc, and where it fails.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise BuildError("nvcc was not found; install the CUDA toolkit, or set CUDA_HOME to where it is")
    targets = tuple(architectures) or known_architectures(nvcc)
    if not targets:
        raise BuildError(f"{nvcc} compiles for none of {', '.join(ARCHITECTURES)}; use the CUDA toolkit 12.0 or newer")
    generate = []
    for arch in targets:
        codes = f"[{arch},compute_80]" if arch == "sm_80" else arch
        generate += ["-gencode", f"arch={arch.replace('sm', 'compute')},code={codes}"]
    command = [nvcc, *_NVCC_FLAGS, *generate, "-Xptxas", "-v", _targets(" ".join(targets))]
    link = [nvcc, "-shared", "-cudart", "static", *generate]
    said = _compile_and_link(sources, library_path("cuda", folder, sources), command, link)
    _remove_others("cuda", folder, sources)
    return _usages(said)


def build_cpu(folder: Path = LIBRARIES, *, sources: Path = SOURCES, extra_flags: Sequence[str] = ()) -> Path:
    """Build the same sources for the CPU (tests) into ``folder``; returns the library's path.

    Args:
        folder: where the library goes.
        sources: another copy of csrc, for instance with a seeded bug.
        extra_flags: for the compiler and the linker, for instance ``-fsanitize=address``.

    Raises:
        BuildError: without g++, and where it fails.
    """
    compiler = _compiler()
    command = [compiler, *_CPU_FLAGS, *extra_flags, _targets("cpu")]
    path = library_path("cpu", folder, sources)
    _compile_and_link(sources, path, command, [compiler, "-shared", *extra_flags])
    _remove_others("cpu", folder, sources)
    return path


def step_library_path(folder: Path = LIBRARIES) -> Path:
    """Where the engine's CPU step stands that was made from these sources for this machine's instructions."""
    return folder / f"{_stem('step')}{_step_identity()}.so"


def build_step(folder: Path = LIBRARIES, *, extra_flags: Sequence[str] = ()) -> Path:
    """Build the engine's CPU step (cpu_step/) for this machine into ``folder``; returns the library's path.

    Raises:
        BuildError: without g++, and where it fails.
    """
    compiler, path = _compiler(), step_library_path(folder)
    with _scratch_in(folder) as scratch:
        built = Path(scratch) / path.name
        _run([compiler, *_STEP_FLAGS, *extra_flags, "-shared", str(STEP_SOURCES / "step.cpp"), "-o", str(built)])
        built.replace(path)
    return path


def _step_identity() -> str:
    """16 hex digits over the sources, the flags and the instructions they are compiled for."""
    digest = hashlib.sha256(" ".join((platform.machine(), *_STEP_FLAGS)).encode())
    for path in sorted(STEP_SOURCES.iterdir()):
        if path.suffix in (".cpp", ".h"):
            digest.update(path.read_bytes())
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        digest.update(next((line for line in lines if line.lower().startswith(("flags", "features"))), "").encode())
    return digest.hexdigest()[:16]


def _compiler() -> str:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise BuildError("g++ was not found; install it, or set CXX to another C++20 compiler")
    return compiler


def _remove_others(kind: str, folder: Path, sources: Path) -> None:
    """Drop libraries of earlier sources."""
    for path in folder.glob(f"{_stem(kind)}*.so"):
        if path != library_path(kind, folder, sources):
            path.unlink(missing_ok=True)


def _targets(names: str) -> str:
    return f'-DMBK_TARGETS="{names}"'


def _compile_and_link(sources: Path, target: Path, command: list[str], link: list[str]) -> str:
    """Compile every .cu side by side, link them, put the library in place by rename; returns what compilers said."""
    with _scratch_in(target.parent) as scratch:
        sheets = sorted(sources.glob("*.cu"))
        objects = [f"{scratch}/{sheet.stem}.o" for sheet in sheets]
        calls = [[*command, "-c", str(sheet), "-o", out] for sheet, out in zip(sheets, objects, strict=True)]
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            said = list(pool.map(_run, calls))
        built = Path(scratch) / target.name
        _run([*link, *objects, "-o", str(built)])
        built.replace(target)
    return "".join(said)


def _scratch_in(folder: Path) -> tempfile.TemporaryDirectory[str]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(dir=folder)
    except OSError as error:
        raise BuildError(
            f"the kernel library cannot be written to {folder} ({error.strerror}); build as a user who may, or install "
            "from a checkout with pip install -e ."
        ) from error


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def _usages(said: str) -> list[KernelUsage]:
    """Reads ptxas: an entry's name, then its spills, then its registers."""
    found, entry, architecture, spilled = [], "", "", 0
    for line in said.splitlines():
        if match := _ENTRY.search(line):
            entry, architecture, spilled = match[1], match[2], 0
        elif match := _SPILLS.search(line):
            spilled = int(match[1]) + int(match[2])
        elif entry and (match := _REGISTERS.search(line)):
            usage = KernelUsage(kernel=entry, architecture=architecture, registers=int(match[1]), spilled_bytes=spilled)
            found.append(usage)
            entry = ""
    names = _demangled([usage.kernel for usage in found])
    return [
        KernelUsage(
            kernel=name,
            architecture=usage.architecture,
            registers=usage.registers,
            spilled_bytes=usage.spilled_bytes,
        )
        for name, usage in zip(names, found, strict=True)
    ]


def _demangled(names: list[str]) -> list[str]:
    """``dechunk_forward<bf16, 1>`` for a mangled name; the names as they are where c++filt is missing."""
    if not names or shutil.which("c++filt") is None:
        return names
    plain = _run(["c++filt", *names]).splitlines()
    noise = re.compile(r"\(anonymous namespace\)::|mbk::|^void |\(\w+\)(?=\d|true|false)")
    return [noise.sub("", name).split("(")[0].replace("__nv_bfloat16", "bf16") for name in plain]
