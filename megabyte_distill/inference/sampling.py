"""Which of the next (byte, bit) pairs, or of the next bytes, is taken."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megabyte_distill.alphabet import BOS_BYTE, BYTE_VOCAB, PAD_BYTE
from megabyte_distill.config.ranges import BOUNDARY_THRESHOLD, MIN_P, TEMPERATURE, TOP_K, TOP_P


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How a class is drawn from log-probabilities. The defaults are exact samples of the model.

    In this order: temperature, top_k, top_p of what is left, min_p.
    """

    temperature: float = 1.0
    """0 takes the likeliest class (greedy)."""
    top_p: float = 1.0
    """Only the fewest classes whose probabilities reach this sum; 1 keeps all."""
    top_k: int = 0
    """Only so many of the likeliest classes; 0 keeps all."""
    min_p: float = 0.0
    """Only classes with at least this share of the likeliest one's probability; 0 keeps all."""
    boundary_threshold: float | None = None
    """Of pairs, before all else: a byte ends a chunk where the model gives that, the byte being taken, more than this
    probability, and nowhere else; bytes stay as likely as they are. None draws the bit with the byte."""

    def __post_init__(self) -> None:
        TEMPERATURE.require("temperature", self.temperature)
        TOP_P.require("top_p", self.top_p)
        TOP_K.require("top_k", self.top_k)
        MIN_P.require("min_p", self.min_p)
        if self.boundary_threshold is not None:
            BOUNDARY_THRESHOLD.require("boundary_threshold", self.boundary_threshold)


def choose(log_probabilities: Tensor, sampling: Sampling, uniform: Tensor) -> Tensor:
    """A class [R] int64 of each row of log_probabilities [R, C], which need not be normalised; −inf is never taken.

    ``uniform`` [R] fp64 in [0, 1) decides: equal numbers give equal classes, whatever the other rows are.
    """
    if sampling.boundary_threshold is not None:
        log_probabilities = decide_bits(log_probabilities, sampling.boundary_threshold)
    if sampling.temperature == 0:
        return log_probabilities.argmax(-1)
    # the likeliest at 0, which no temperature, however small, takes to −inf
    relative = log_probabilities.double() - log_probabilities.amax(-1, keepdim=True)
    order = (relative / sampling.temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
    probabilities = order.values
    if sampling.top_k:
        probabilities[:, sampling.top_k :] = 0.0
    if sampling.top_p < 1:
        before = probabilities.cumsum(-1) - probabilities
        probabilities[before >= sampling.top_p * probabilities.sum(-1, keepdim=True)] = 0.0
    if sampling.min_p:
        probabilities[probabilities < sampling.min_p * probabilities[:, :1]] = 0.0
    cumulative = probabilities.cumsum(-1)
    total = cumulative[:, -1:]
    # rounding may carry uniform · total up to total, behind the last class there is
    target = torch.minimum(uniform[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    position = torch.searchsorted(cumulative, target, right=True)
    chosen: Tensor = order.indices.gather(1, position)[:, 0]
    return chosen


def decide_bits(log_probabilities: Tensor, threshold: float) -> Tensor:
    """Of pairs [R, 512] each byte's whole probability on one of its bits, −inf on the other.

    The bit is 1 where its share is above the threshold, and on BOS, which is a chunk of its own.
    """
    pairs = log_probabilities.double().view(-1, 2, BYTE_VOCAB)
    both = torch.logaddexp(pairs[:, 0], pairs[:, 1])
    ends = pairs[:, 1] - both > math.log(threshold)  # NaN where a byte is impossible, which stays so
    ends[:, BOS_BYTE] = True
    decided = torch.stack((both.masked_fill(ends, -torch.inf), both.masked_fill(~ends, -torch.inf)), dim=1)
    return decided.view_as(log_probabilities)


def mask_padding(log_probabilities: Tensor) -> Tensor:
    """A copy of [.., 512] (pairs) or [.., 256] (bytes) in which PAD is impossible."""
    masked = log_probabilities.clone()
    masked[..., PAD_BYTE::BYTE_VOCAB] = -torch.inf
    return masked


def mask_bytes(log_probabilities: Tensor, allowed: Tensor) -> Tensor:
    """A copy of [R, 512] (pairs) or [R, 256] (bytes) in which bytes not ``allowed`` [R, 256] are impossible."""
    repeated = allowed.repeat(1, log_probabilities.shape[1] // BYTE_VOCAB)
    return log_probabilities.masked_fill(~repeated, -torch.inf)


def uniform_numbers(rows: int, count: int, seed: int) -> Tensor:
    """[rows, count] fp64 in [0, 1); row i depends on seed + i alone."""
    numbers = [
        torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + row))
        for row in range(rows)
    ]
    return torch.stack(numbers)
