"""One thread, fixed seeds and a module cache of our own for every test, set before torch counts the cores."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
# where transformers copies the code of exported folders; read when it is imported. One for each pytest process: two
# would copy over each other
os.environ["HF_MODULES_CACHE"] = str(
    Path(tempfile.gettempdir())
    / f"megabyte-distill-modules-{os.getuid()}-{os.environ.get('PYTEST_XDIST_WORKER', 'main')}"
)

import random

import numpy as np
import pytest
import torch

from megabyte_distill.data import progress

# a shell's background job ignores Ctrl-C, and hands that on to the processes that the tests interrupt
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

SEED = 1234


@pytest.hookimpl(wrapper=True)
def pytest_report_to_serializable() -> Generator[None, Any, Any]:
    """Bytes that are no UTF-8, as a failing test may show, would end the process that sends the report of it."""
    return _escaped((yield))


def _escaped(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {_escaped(key): _escaped(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return (list if isinstance(value, list) else tuple)(map(_escaped, value))
    return value


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def every_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Progress in a log has a line for every part that is done, however short that took."""
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
