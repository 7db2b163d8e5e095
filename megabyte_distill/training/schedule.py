"""Learning rate as a function of the update, stepped once per update whatever the number of ranks."""

from __future__ import annotations

import math

from megabyte_distill.config.stage import LrDecayStyle, StageConfig


def learning_rate_factor(config: StageConfig, iteration: int) -> float:
    """Share of the highest learning rate at update ``iteration`` (counted from 0), in (0, 1].

    Linear warm-up whose first update is already above zero, then the decay of ``lr_decay_style`` down to
    ``config.floor_ratio``, reached at the last update.
    """
    warmup = config.warmup_iterations
    if iteration < warmup:
        return (iteration + 1) / (warmup + 1)
    if config.lr_decay_style is LrDecayStyle.CONSTANT:
        return 1.0
    progress = min(1.0, (iteration - warmup) / max(1, config.train_iters - 1 - warmup))
    shape = 0.5 * (1 + math.cos(math.pi * progress)) if config.lr_decay_style is LrDecayStyle.COSINE else 1 - progress
    floor = config.floor_ratio
    return floor + (1 - floor) * shape
