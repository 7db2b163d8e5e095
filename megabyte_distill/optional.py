"""The only file that imports Transformer Engine, apex, mamba_ssm and wandb, which a user may not have.

An installed package without its native libraries raises other things than ImportError (Transformer Engine without CUDA
raises RuntimeError), so all of those mean "not usable here".
"""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

_FAILURES = (ImportError, RuntimeError, OSError, AssertionError)


def usable(name: str) -> ModuleType | None:
    """The module, or None where it is not installed or cannot be loaded on this machine."""
    try:
        return importlib.import_module(name)
    except _FAILURES:
        return None


def require_wandb() -> ModuleType:
    """wandb, or a ValueError that says how to get it."""
    module = usable("wandb")
    if module is None:
        raise ValueError(
            "--wandb-project was given, but the package wandb is not usable; pip install 'megabyte-distill[wandb]'"
        )
    return module


def describe() -> dict[str, str]:
    """Which optional packages are usable here: name → version, or "not usable"."""
    names = ("transformer_engine", "apex", "mamba_ssm", "wandb")
    found = {name: usable(name) for name in names if importlib.util.find_spec(name) is not None}
    return {n: getattr(found.get(n), "__version__", "present") if found.get(n) else "not usable" for n in names}
