"""Backbones of published models, by the name of their preset: what can be reckoned without a teacher on disk."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from megabyte_distill.config.model import Activation, BackboneConfig, QkNorm, RopeScaling


def _llama3_scaling(factor: float) -> dict[str, float]:
    return {
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192.0,
    }


PUBLISHED_BACKBONES: Mapping[str, BackboneConfig] = MappingProxyType(
    {
        "llama3.2-3b": BackboneConfig(
            family="llama",
            num_layers=28,
            hidden_size=3072,
            ffn_hidden_size=8192,
            num_attention_heads=24,
            num_query_groups=8,
            head_dim=128,
            vocab_size=128_256,
            norm_eps=1e-5,
            rope_theta=500_000.0,
            rope_scaling=_llama3_scaling(32.0),
            rope_scaling_kind=RopeScaling.LLAMA3,
            tied_embeddings=True,
            max_position_embeddings=131_072,
        ),
        "qwen3-4b": BackboneConfig(
            family="qwen3",
            num_layers=36,
            hidden_size=2560,
            ffn_hidden_size=9728,
            num_attention_heads=32,
            num_query_groups=8,
            head_dim=128,
            vocab_size=151_936,
            norm_eps=1e-6,
            rope_theta=1_000_000.0,
            qk_norm=QkNorm.HEAD,
            tied_embeddings=True,
            max_position_embeddings=40_960,
        ),
        "olmo2-1b": BackboneConfig(
            family="olmo2",
            num_layers=16,
            hidden_size=2048,
            ffn_hidden_size=8192,
            num_attention_heads=16,
            num_query_groups=16,
            head_dim=128,
            vocab_size=100_352,
            norm_eps=1e-6,
            rope_theta=500_000.0,
            qk_norm=QkNorm.FULL,
            post_norm=True,
            max_position_embeddings=4096,
        ),
        "llama3.1-8b": BackboneConfig(
            family="llama",
            num_layers=32,
            hidden_size=4096,
            ffn_hidden_size=14_336,
            num_attention_heads=32,
            num_query_groups=8,
            head_dim=128,
            vocab_size=128_256,
            norm_eps=1e-5,
            rope_theta=500_000.0,
            rope_scaling=_llama3_scaling(8.0),
            rope_scaling_kind=RopeScaling.LLAMA3,
            max_position_embeddings=131_072,
        ),
        "gemma3-1b": BackboneConfig(
            family="gemma3",
            num_layers=26,
            hidden_size=1152,
            ffn_hidden_size=6912,
            num_attention_heads=4,
            num_query_groups=1,
            head_dim=256,
            vocab_size=262_144,
            norm_eps=1e-6,
            rope_theta=1_000_000.0,
            qk_norm=QkNorm.HEAD,
            query_pre_attn_scalar=256,
            activation=Activation.GELU_TANH,
            sandwich_norm=True,
            zero_centred_norms=True,
            scaled_embeddings=True,
            sliding_window=512,
            sliding_layers=tuple(layer for layer in range(26) if (layer + 1) % 6),
            sliding_rope_theta=10_000.0,
            tied_embeddings=True,
            max_position_embeddings=32_768,
        ),
    }
)
