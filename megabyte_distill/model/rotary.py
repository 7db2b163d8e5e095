"""Rotary position angles, with Llama 3's frequency scaling; independent of any library's version."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def inverse_frequencies(head_dim: int, theta: float, scaling: dict[str, float] | None = None) -> Tensor:
    """The head_dim / 2 angular frequencies [head_dim // 2], fp32, radians per position.

    ``scaling``: Llama 3's (``factor, low_freq_factor, high_freq_factor, original_max_position_embeddings``): waves
    longer than the original context over ``low_freq_factor`` are stretched by ``factor``, short ones stay, those
    between are interpolated. Source: the Llama 3.1 release; the same numbers as transformers' ``rope_type=llama3``.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequencies = 1.0 / (theta**exponent)
    if scaling is None:
        return frequencies
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    context = scaling["original_max_position_embeddings"]
    wavelength = 2 * math.pi / frequencies
    smooth = (context / wavelength - low) / (high - low)
    between = (1 - smooth) * frequencies / factor + smooth * frequencies
    scaled = torch.where(wavelength > context / low, frequencies / factor, frequencies)
    is_between = (wavelength >= context / high) & (wavelength <= context / low)
    return torch.where(is_between, between, scaled)


def rotary_angles(positions: Tensor, frequencies: Tensor) -> Tensor:
    """Angles [N, 1, 1, head_dim] fp32 of N positions, each frequency twice (megatron's half-rotated layout)."""
    angles = torch.outer(positions.to(frequencies.dtype), frequencies)
    return torch.cat((angles, angles), dim=-1)[:, None, None, :]


def packed_positions(cu_seqlens: Tensor, length: int) -> Tensor:
    """Position [length] int64 of each element within its own segment, counted from 0."""
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).long()
    starts = torch.repeat_interleave(cu_seqlens[:-1].long(), lengths, output_size=length)
    return torch.arange(length, device=cu_seqlens.device) - starts
