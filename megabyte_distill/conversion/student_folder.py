"""The Hugging Face folder of an exported student: its files' names and fields, and where the teacher's parts are.

Layout::

    config.json, generation_config.json, tokenizer_config.json
    model.safetensors            or shards with an index; backbone.* under the teacher family's own names
    *.py                         flat_sources.py
    backbone_tokenizer/          the teacher's tokenizer, for taking the backbone out again
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megabyte_distill.alphabet import BOS_BYTE, BYTE_VOCAB, PAD_BYTE
from megabyte_distill.config.fields import from_fields, to_fields
from megabyte_distill.config.model import BackboneConfig
from megabyte_distill.conversion.hf_config import HfConfig
from megabyte_distill.conversion.model_config import ModelConfig

MODEL_TYPE = "megabyte"
BACKBONE_TOKENIZER = "backbone_tokenizer"
SHORTEST_CONTEXT = 8192
"""Bytes that ``max_position_embeddings`` grants at least: harnesses cut longer prompts off."""


def config_fields(
    config: ModelConfig, backbone_config: dict[str, Any], dtype: str, *, paths: int, boundary_threshold: float | None
) -> dict[str, Any]:
    """config.json of a student; ``backbone_config`` is that of its backbone as a token model."""
    assert config.byte_side is not None
    return {
        "architectures": ["MegabyteForCausalLM"],
        "model_type": MODEL_TYPE,
        "auto_map": {
            "AutoConfig": "configuration_megabyte.MegabyteConfig",
            "AutoModelForCausalLM": "modeling_megabyte.MegabyteForCausalLM",
        },
        "vocab_size": BYTE_VOCAB,
        "max_position_embeddings": _context(config.backbone),
        "paths": paths,
        "boundary_threshold": boundary_threshold,
        "byte_side": to_fields(config.byte_side),
        "backbone": to_fields(config.backbone),
        "backbone_config": backbone_config,
        "tie_word_embeddings": False,
        **_special_ids(),
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def generation_fields() -> dict[str, Any]:
    """generation_config.json: a BOS ends the text, and PAD is never drawn."""
    return {**_special_ids(), "suppress_tokens": [PAD_BYTE]}


def tokenizer_fields(config: ModelConfig) -> dict[str, Any]:
    """tokenizer_config.json."""
    return {
        "tokenizer_class": "MegabyteTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_megabyte.MegabyteTokenizer", None]},
        "model_max_length": _context(config.backbone),
        "padding_side": "left",
    }


def is_student(config: HfConfig) -> bool:
    """True for the config.json of an exported student."""
    return config.fields.get("model_type") == MODEL_TYPE


def backbone_section(config: HfConfig) -> HfConfig:
    """The config.json of the student's backbone as a token model. ValueError where there is none."""
    section = config.section("backbone_config")
    if section is None:
        raise ValueError(f"{config.where}: a student without backbone_config; export it again")
    return section


def check_backbone(config: HfConfig, described: BackboneConfig) -> None:
    """ValueError where the backbone the student runs with is not the one ``described`` by backbone_config."""
    if from_fields(BackboneConfig, config.fields.get("backbone") or {}, f"{config.where}, backbone") != described:
        raise ValueError(f"{config.where}: backbone and backbone_config describe different models; export it again")


def tokenizer_of(folder: Path) -> Path:
    """Where the teacher's tokenizer lies; ValueError where it was left behind."""
    found = folder / BACKBONE_TOKENIZER
    if not found.is_dir():
        raise ValueError(
            f"{folder} has no {BACKBONE_TOKENIZER}, which save_pretrained does not copy; take the folder that "
            "convert_checkpoint.py export wrote"
        )
    return found


def _special_ids() -> dict[str, int]:
    return {"bos_token_id": BOS_BYTE, "eos_token_id": BOS_BYTE, "pad_token_id": PAD_BYTE}


def _context(backbone: BackboneConfig) -> int:
    """Bytes: chunks are never more, so a text of this length fits the backbone's positions, or is short."""
    return max(SHORTEST_CONTEXT, backbone.max_position_embeddings)
