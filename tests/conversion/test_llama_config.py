"""A Llama config.json in both directions, and the settings that are refused."""

from __future__ import annotations

from typing import Any

import pytest
import transformers

from megabyte_distill.config.model import BackboneConfig
from megabyte_distill.conversion.families import family_named, family_of_config
from megabyte_distill.conversion.hf_config import HfConfig
from megabyte_distill.conversion.llama import LLAMA

SCALING = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
REQUIRED = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": 2,
    "num_attention_heads": 6, "num_key_value_heads": 2, "vocab_size": 200,
}  # fmt: skip


def read(**fields: Any) -> BackboneConfig:
    return LLAMA.read_config(HfConfig({**REQUIRED, **fields}, "config.json"))


@pytest.mark.parametrize("scaling", [None, SCALING])
@pytest.mark.parametrize("tied", [False, True])
def test_written_fields_read_back_equal(scaling: dict[str, float] | None, tied: bool) -> None:
    config = BackboneConfig(
        family="llama", num_layers=3, hidden_size=48, ffn_hidden_size=56, num_attention_heads=6, num_query_groups=2,
        head_dim=16, vocab_size=200, norm_eps=1e-4, rope_theta=5e5, rope_scaling=scaling, tied_embeddings=tied,
        max_position_embeddings=512,
    )  # fmt: skip
    fields = LLAMA.write_config(config)
    assert LLAMA.read_config(HfConfig(fields, "config.json")) == config
    theirs = transformers.LlamaConfig(**fields)
    assert theirs.rope_parameters["rope_theta"] == 5e5
    assert theirs.rope_parameters["rope_type"] == ("llama3" if scaling else "default")
    assert LLAMA.read_config(HfConfig(theirs.to_dict(), "config.json")) == config


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **SCALING}},
        {"rope_theta": 500000, "rope_scaling": {"rope_type": "llama3", **SCALING}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **SCALING}},
    ],
)
def test_new_and_old_spellings_of_rope_agree(spelling: dict[str, Any]) -> None:
    config = read(**spelling)
    assert config.rope_theta == 5e5 and config.rope_scaling == SCALING


def test_absent_fields_mean_what_transformers_takes_them_for() -> None:
    config, theirs = read(), transformers.LlamaConfig(**REQUIRED)
    assert config.norm_eps == theirs.rms_norm_eps
    assert config.rope_theta == theirs.rope_parameters["rope_theta"]
    assert config.tied_embeddings == theirs.tie_word_embeddings
    assert config.head_dim == theirs.head_dim
    assert config.max_position_embeddings == theirs.max_position_embeddings


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attention_bias": True}, "attention_bias = True is not supported"),
        ({"mlp_bias": True}, "mlp_bias = True"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"sliding_window": 128, "max_position_embeddings": 512}, "sliding_window = 128"),
        ({"quantization_config": {"bits": 4}}, "unquantised"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "rope_type is 'longrope'"),
        ({"rope_parameters": {"rope_theta": 1e4}, "rope_theta": 2e4}, "expected one value"),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}},
            "rope_parameters: the field factor is missing",
        ),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_parameters": {}, "rope_scaling": {"type": "llama3", **SCALING}}, "contradict each other"),
        ({"hidden_size": 50}, "not divisible by 6 heads"),
        ({"num_key_value_heads": 4}, "cannot share 4 key/value heads"),
        ({"vocab_size": None}, "the field vocab_size is missing"),
        ({"num_hidden_layers": "two"}, "num_hidden_layers is 'two'; expected a positive integer"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0; expected a positive number"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1; expected true or false"),
    ],
)
def test_what_the_backbone_cannot_reproduce_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(**fields)


def test_a_window_as_long_as_the_context_is_no_window() -> None:
    assert read(sliding_window=512, max_position_embeddings=512) == read(max_position_embeddings=512)


def test_unknown_architectures_and_families_list_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown architecture Gemma2ForCausalLM; known are .*LlamaForCausalLM"):
        family_of_config(HfConfig({"architectures": ["Gemma2ForCausalLM"]}, "config.json"))
    with pytest.raises(ValueError, match="architectures is None"):
        family_of_config(HfConfig({}, "config.json"))
    with pytest.raises(ValueError, match="unknown model family 'gemma2'; known are llama"):
        family_named("gemma2")
