"""The only file that imports Transformer Engine, apex, mamba_ssm and wandb, which a user may not have.

An installed package without its native libraries raises other things than ImportError (Transformer Engine without CUDA
raises RuntimeError), so all of those mean "not usable here". megatron-core expects ImportError alone and would end with
the rest of them: what it must not see is hidden before its first import (:func:`guard_megatron`).
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import platform
import subprocess
import sys
import warnings
from collections.abc import Sequence
from importlib import metadata
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

_FAILURES = (ImportError, RuntimeError, OSError, AssertionError, AttributeError, subprocess.SubprocessError)
_NOT_INSTALLED = "is not installed"
_TAKEN_BY_MEGATRON = ("transformer_engine", "apex")
_DECISIVE = ("torch", "megatron-core", "numpy", "transformer-engine", "mamba-ssm", "triton")
OLDEST_ENGINE = (2, 3)
"""The first Transformer Engine with every FP8 recipe that megatron-core offers."""


def usable(name: str) -> ModuleType | None:
    """The module, or None where it is not installed or cannot be loaded on this machine."""
    try:
        return importlib.import_module(name)
    except _FAILURES:
        return None


@functools.cache
def problem(name: str) -> str | None:
    """Why an optional package cannot be used on this machine ("is …", "cannot …"), None where it can."""
    if importlib.util.find_spec(name) is None:
        return _NOT_INSTALLED
    if name == "apex" and not _is_nvidias_apex():
        return "is another package of that name (a web toolkit), not NVIDIA's"
    # the parts that megatron-core takes: a package may load without them
    parts = {"transformer_engine": ("transformer_engine.pytorch",), "apex": ("apex.optimizers", "amp_C")}
    try:
        for part in parts.get(name, (name,)):
            importlib.import_module(part)
    except _FAILURES as error:
        first_line = (str(error).strip().splitlines() or [""])[0]
        return f"cannot be loaded ({type(error).__name__}: {first_line[:200]})"
    if name in _TAKEN_BY_MEGATRON and not importlib.import_module("torch").cuda.is_available():
        return "runs on GPUs alone, and torch sees none"
    return None


def _is_nvidias_apex() -> bool:
    """Told by its files: the other package was written for Python 2, and importing it may raise anything."""
    spec = importlib.util.find_spec("apex")
    folders = spec.submodule_search_locations if spec is not None else None
    return any((Path(folder) / "optimizers" / "fused_adam.py").is_file() for folder in folders or ())


def engine_problem() -> str | None:
    """Why the backbone cannot be built from Transformer Engine's layers here, None where it can."""
    why = problem("transformer_engine")
    if why is not None:
        return why
    version = str(getattr(importlib.import_module("transformer_engine"), "__version__", "0"))
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if numbers < OLDEST_ENGINE:
        return f"is {version}, and {'.'.join(map(str, OLDEST_ENGINE))} or newer is needed"
    return None


class _BeforeMegatron(MetaPathFinder):
    """Finds nothing; is asked for megatron.core before it is loaded, and acts then."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname == "megatron.core":
            sys.meta_path.remove(self)
            hide_unusable()
        return None


def guard_megatron() -> None:
    """Have :func:`hide_unusable` run before the first import of megatron-core; nothing is imported until then."""
    if "megatron.core" not in sys.modules and not any(isinstance(f, _BeforeMegatron) for f in sys.meta_path):
        sys.meta_path.insert(0, _BeforeMegatron())


def hide_unusable() -> None:
    """Make installed packages that cannot be used raise ImportError wherever they are imported, with a warning each."""
    for name in _TAKEN_BY_MEGATRON:
        why = problem(name)
        if why is None or why == _NOT_INSTALLED:
            continue
        for loaded in [module for module in sys.modules if module.split(".")[0] == name]:
            del sys.modules[loaded]
        # Python's own mark for "there is none": ModuleNotFoundError for whoever imports it
        sys.modules[name] = None  # type: ignore[assignment]
        if os.environ.get("RANK", "0") == "0":
            warnings.warn(f"{name} {why}; it is left out", RuntimeWarning, stacklevel=2)


def require_wandb() -> ModuleType:
    """wandb, or a ValueError that says how to get it."""
    module = usable("wandb")
    if module is None:
        raise ValueError(
            "--wandb-project was given, but the package wandb is not usable; pip install 'megabyte-distill[wandb]'"
        )
    return module


def describe() -> dict[str, str]:
    """Which optional packages are installed here: name → version, or why it is not usable."""
    found = {name: problem(name) for name in ("transformer_engine", "apex", "mamba_ssm", "wandb")}
    return {
        name: getattr(importlib.import_module(name), "__version__", "present") if why is None else f"not usable: {why}"
        for name, why in found.items()
        if why != _NOT_INSTALLED
    }


def library_versions() -> dict[str, str]:
    """Versions of Python and of the installed libraries that decide a run's numbers. Imports none of them."""
    found = {"python": platform.python_version()}
    for name in _DECISIVE:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found
