"""One thread, fixed seeds and a module cache of our own for every test, set before torch counts the cores."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
# where transformers copies the code of exported folders; read when it is imported
os.environ.setdefault("HF_MODULES_CACHE", str(Path(tempfile.gettempdir()) / f"megabyte-distill-modules-{os.getuid()}"))

import random

import numpy as np
import pytest
import torch

SEED = 1234


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
