"""One thread and fixed seeds for every test, set before torch counts the cores."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"

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
