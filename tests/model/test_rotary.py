"""Rotary angles: transformers' numbers, and positions that start anew in each segment."""

from __future__ import annotations

import pytest
import torch

from megabyte_distill.model.rotary import inverse_frequencies, packed_positions, rotary_angles

LLAMA_3_2_3B = {
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LLAMA_3_1_8B = {**LLAMA_3_2_3B, "factor": 8.0}
NARROW_BAND = {**LLAMA_3_2_3B, "low_freq_factor": 3.0, "original_max_position_embeddings": 300}


@pytest.mark.parametrize("head_dim", [8, 64, 128])
@pytest.mark.parametrize("theta", [1e4, 5e5])
@pytest.mark.parametrize("scaling", [None, LLAMA_3_2_3B, LLAMA_3_1_8B, NARROW_BAND])
def test_frequencies_equal_those_of_transformers(head_dim: int, theta: float, scaling: dict[str, float] | None) -> None:
    transformers = pytest.importorskip("transformers", reason="the reference for RoPE; pip install .[hf]")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope = {"rope_theta": theta, "rope_type": "llama3", **scaling} if scaling else {"rope_theta": theta}
    config = transformers.LlamaConfig(
        hidden_size=head_dim, num_attention_heads=1, head_dim=head_dim, max_position_embeddings=131_072,
        rope_parameters={"rope_type": "default", **rope},
    )  # fmt: skip
    theirs = LlamaRotaryEmbedding(config)
    ours = inverse_frequencies(head_dim, theta, scaling)
    torch.testing.assert_close(ours, theirs.inv_freq.float(), rtol=1e-6, atol=0)
    positions = torch.tensor([0, 1, 17, 1000])
    cos, sin = theirs(torch.zeros(1, 4, head_dim), positions[None])
    angles = rotary_angles(positions, ours)
    torch.testing.assert_close(angles.cos(), cos[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(angles.sin(), sin[0], rtol=0, atol=1e-4)


def test_scaling_leaves_short_waves_and_stretches_long_ones() -> None:
    plain, scaled = inverse_frequencies(128, 5e5), inverse_frequencies(128, 5e5, LLAMA_3_2_3B)
    wavelength = 2 * torch.pi / plain
    assert torch.equal(scaled[wavelength < 8192 / 4], plain[wavelength < 8192 / 4])
    torch.testing.assert_close(scaled[wavelength > 8192], plain[wavelength > 8192] / 32)
    between = (wavelength > 8192 / 4) & (wavelength < 8192)
    assert between.any() and (scaled[between] < plain[between]).all() and (scaled[between] > plain[between] / 32).all()


def test_positions_restart_in_every_segment() -> None:
    cu_seqlens = torch.tensor([0, 3, 4, 9], dtype=torch.int32)
    assert packed_positions(cu_seqlens, 9).tolist() == [0, 1, 2, 0, 0, 1, 2, 3, 4]


def test_angles_are_each_frequency_twice_in_fp32() -> None:
    angles = rotary_angles(torch.tensor([0, 2]), torch.tensor([1.0, 0.5]))
    assert angles.shape == (2, 4) and angles.dtype is torch.float32
    assert angles.tolist() == [[0, 0, 0, 0], [2, 1, 2, 1]]
