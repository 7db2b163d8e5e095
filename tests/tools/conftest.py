"""The small job of tests/pretrain, shared."""

from __future__ import annotations

from tests.pretrain.conftest import finished, job

__all__ = ["finished", "job"]
