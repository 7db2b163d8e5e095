"""One exported student for the tests that only read it."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("transformers", reason="exports are loaded with it; pip install .[hf]")

from tests.hf.exported import Exported, make_exported
from tests.tiny_student import world

__all__ = ["world"]


@pytest.fixture(scope="module")
def exported(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Convolutions, hard dechunk, Llama."""
    import torch

    torch.manual_seed(7)
    return make_exported(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def model(exported: Exported) -> Any:
    """The export, loaded."""
    return exported.load()
