"""Curves of bits per byte against bytes: how many bytes one needs for another's quality, and what seeds leave open."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

SPREAD, PAIRED_SPREAD = "spread_bits_per_byte", "paired_spread_bits_per_byte"
"""Names of what :func:`spreads` finds, in results."""
Curve = Mapping[int, float]
"""Bytes of stage 2 → bits per byte."""


def bytes_needed(curve: Curve, quality: float) -> float | None:
    """Bytes at which a curve first reaches so many bits per byte, linear on the logarithm of bytes; None outside it."""
    points = sorted(curve.items())
    if points[0][1] < quality:
        return None
    for (size, bits), (next_size, next_bits) in itertools.pairwise(points):
        if next_bits <= quality <= bits:
            share = (bits - quality) / (bits - next_bits) if bits > next_bits else 0.0
            return float(size * (next_size / size) ** share)
    return None


def factors(reference: Curve, arm: Curve) -> dict[int, float | None]:
    """By the arm's bytes: how many times these the reference needs for the same quality; None where it ends before."""
    needed = {size: bytes_needed(reference, bits) for size, bits in arm.items()}
    return {size: None if value is None else value / size for size, value in needed.items()}


def spread(values: Sequence[float]) -> float:
    """Standard deviation over seeds; 0 for one."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def headline(by_seed: Sequence[Mapping[int, float | None]]) -> dict[str, Any]:
    """Mean and spread of the factor at the most bytes at which every seed has one, and at all such sizes."""
    every: dict[int, list[float]] = {}
    for size in sorted(by_seed[0]):
        values = [found for seed in by_seed if (found := seed[size]) is not None]
        if len(values) == len(by_seed):
            every[size] = values
    at_all = {size: {"mean": statistics.mean(v), "spread": spread(v)} for size, v in every.items()}
    if not every:
        return {"at_bytes": None, "mean": None, "spread": None, "at_all": {}}
    largest = max(every)
    # JSON has no other keys
    return {"at_bytes": largest, **at_all[largest], "at_all": {str(size): found for size, found in at_all.items()}}


def spreads(curves: Sequence[Sequence[Curve]]) -> dict[str, dict[str, float]]:
    """Standard deviations over seeds by bytes of stage 2: of an arm's bits per byte, and of the difference of two arms,
    which is smaller, since arms of a seed share stage 1 and text. Each is pooled over the arms that have the size.
    """
    of_one: dict[str, float] = {}
    of_two: dict[str, float] = {}
    for size in sorted({size for seeds in curves for size in seeds[0]}):
        arms = [[curve[size] for curve in seeds] for seeds in curves if size in seeds[0]]
        of_one[str(size)] = pooled(arms)
        if pairs := list(itertools.combinations(arms, 2)):
            of_two[str(size)] = pooled([[x - y for x, y in zip(*pair, strict=True)] for pair in pairs])
    return {SPREAD: of_one, PAIRED_SPREAD: of_two}


def pooled(samples: Sequence[Sequence[float]]) -> float:
    """Standard deviation over seeds, the root of its mean square over several arms."""
    return math.sqrt(statistics.mean(spread(values) ** 2 for values in samples))
