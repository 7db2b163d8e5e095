"""Rotary positions: frequencies, with Llama 3's scaling, YaRN and linear, the rotation, and which layers turn how."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megabyte_distill.config.model import BackboneConfig, RopeScaling
from megabyte_distill.kernels.ops import accumulation_dtype


def inverse_frequencies(
    head_dim: int, theta: float, scaling: dict[str, float] | None = None, kind: RopeScaling = RopeScaling.LLAMA3
) -> Tensor:
    """The head_dim / 2 angular frequencies [head_dim // 2], fp32, radians per position.

    ``scaling``: as ``BackboneConfig.rope_scaling``. Source: the Llama 3.1 release, and YaRN (Peng et al. 2023); the
    same numbers as transformers' ``rope_type`` llama3, yarn and linear.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequencies = 1.0 / (theta**exponent)
    if scaling is None:
        return frequencies
    if kind is RopeScaling.LINEAR:
        return frequencies / scaling["factor"]
    return _llama3(frequencies, scaling) if kind is RopeScaling.LLAMA3 else _yarn(frequencies, theta, scaling)


def _llama3(frequencies: Tensor, scaling: dict[str, float]) -> Tensor:
    """Waves longer than the original context over ``low_freq_factor`` are stretched by ``factor``, short ones stay,
    those between are interpolated.
    """
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    context = scaling["original_max_position_embeddings"]
    wavelength = 2 * math.pi / frequencies
    smooth = (context / wavelength - low) / (high - low)
    between = (1 - smooth) * frequencies / factor + smooth * frequencies
    scaled = torch.where(wavelength > context / low, frequencies / factor, frequencies)
    is_between = (wavelength >= context / high) & (wavelength <= context / low)
    return torch.where(is_between, between, scaled)


def _yarn(frequencies: Tensor, theta: float, scaling: dict[str, float]) -> Tensor:
    """Waves that turn more than ``beta_fast`` times in the original context stay, those that turn less than
    ``beta_slow`` times are stretched by ``factor``, with a ramp over the dimensions between.
    """
    head_dim, context = 2 * frequencies.shape[0], scaling["original_max_position_embeddings"]

    def dimension(turns: float) -> float:
        return head_dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(scaling["beta_fast"]), dimension(scaling["beta_slow"])
    if scaling["truncate"]:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low or 0.001
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    return frequencies / scaling["factor"] * ramp + frequencies * (1 - ramp)


def rotation_magnitude(scaling: dict[str, float] | None, kind: RopeScaling) -> float:
    """What rotated queries and keys are multiplied with: YaRN's attention factor, else 1."""
    return scaling["attention_factor"] if scaling is not None and kind is RopeScaling.YARN else 1.0


def rotary_angles(positions: Tensor, frequencies: Tensor) -> Tensor:
    """Angles [N, head_dim] of N positions, each frequency twice (the half-rotated layout); of its dtype."""
    angles = torch.outer(positions.to(frequencies.dtype), frequencies)
    return torch.cat((angles, angles), dim=-1)


def turns(angles: Tensor, magnitude: float = 1.0) -> Tensor:
    """Cosines and sines [2, N, head_dim] fp32 of angles [N, head_dim], times ``magnitude``; for :func:`rotate`."""
    return torch.stack((angles.cos(), angles.sin())) * magnitude


def rotate(x: Tensor, by: Tensor) -> Tensor:
    """Rotates heads x [N, …, head_dim] by :func:`turns` [2, N, head_dim], in fp32 or fp64; the result has x's dtype."""
    cosines, sines = by.view(2, by.shape[1], *[1] * (x.dim() - 2), by.shape[2])
    wide = x.to(accumulation_dtype(x.dtype))
    first, second = wide.chunk(2, dim=-1)
    turned: Tensor = wide * cosines + torch.cat((-second, first), dim=-1) * sines
    return turned.to(x.dtype)


def packed_positions(cu_seqlens: Tensor, length: int) -> Tensor:
    """Position [length] int64 of each element within its own segment, counted from 0."""
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).long()
    starts = torch.repeat_interleave(cu_seqlens[:-1].long(), lengths, output_size=length)
    return torch.arange(length, device=cu_seqlens.device) - starts


class RotaryTable:
    """Rotations of positions: one set for the layers that attend to everything, one for those with a window."""

    def __init__(self, config: BackboneConfig) -> None:
        # no buffers: a bf16 cast must not round them
        self._full = inverse_frequencies(
            config.head_dim, config.rope_theta, config.rope_scaling, config.rope_scaling_kind
        )
        self._sliding = inverse_frequencies(config.head_dim, config.sliding_rope_theta or config.rope_theta)
        self._has_sliding = bool(config.sliding_layers)
        self._magnitude = rotation_magnitude(config.rope_scaling, config.rope_scaling_kind)

    @property
    def frequencies(self) -> tuple[Tensor, Tensor, float]:
        """(radians a position of full layers [head_dim / 2], of sliding layers, factor on the full layers' turns)."""
        return self._full, self._sliding, self._magnitude

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """(turns [2, N, head_dim] of full layers, of sliding layers), fp32; the same where no layer slides.

        Layers with a window turn at unscaled frequencies, of a base of their own where the configuration has one.
        """
        full, sliding = self.angles(positions)
        turned = turns(full, self._magnitude)
        return turned, turns(sliding) if self._has_sliding else turned

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The same as angles [N, head_dim] fp32, without the factor on the full layers' turns."""
        if self._full.device != positions.device:
            self._full, self._sliding = self._full.to(positions.device), self._sliding.to(positions.device)
        full = rotary_angles(positions, self._full)
        return full, rotary_angles(positions, self._sliding) if self._has_sliding else full


@dataclass(frozen=True, slots=True)
class LayerReach:
    """What a layer attends to."""

    window: int | None
    """Positions, its own included; None attends to everything before."""

    @classmethod
    def of(cls, config: BackboneConfig, layer: int) -> LayerReach:
        """Of a layer counted from 0."""
        return cls(config.sliding_window if layer in config.sliding_layers else None)

    def choose(self, rotations: tuple[Tensor, Tensor]) -> Tensor:
        """The layer's own of :class:`RotaryTable`'s two sets."""
        return rotations[0 if self.window is None else 1]
