"""How training ends where it cannot go on."""

from __future__ import annotations


class TrainingFailure(RuntimeError):
    """Training cannot go on; every rank raises it at the same update. The message names the stage and the update."""
