"""model_config.json: the dataclasses come back equal, and nothing unknown is accepted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megabyte_distill.config.model import BackboneConfig, ByteMixer, ByteSideConfig, DechunkMode
from megabyte_distill.conversion.model_config import (
    MODEL_CONFIG_FILE,
    ModelConfig,
    read_model_config,
    write_model_config,
)

BACKBONE = BackboneConfig(
    family="llama", num_layers=3, hidden_size=48, ffn_hidden_size=56, num_attention_heads=6, num_query_groups=2,
    head_dim=16, vocab_size=200, norm_eps=1e-4, rope_theta=5e5, rope_scaling={"factor": 8.0}, tied_embeddings=True,
)  # fmt: skip
BYTE_SIDE = ByteSideConfig(
    backbone_width=48, byte_mixer=ByteMixer.CONV, conv_dilations=(1, 3), dechunk_mode=DechunkMode.CAUSAL
)


@pytest.mark.parametrize("byte_side", [None, BYTE_SIDE])
def test_written_and_read_is_equal(tmp_path: Path, byte_side: ByteSideConfig | None) -> None:
    config = ModelConfig(backbone=BACKBONE, byte_side=byte_side)
    write_model_config(tmp_path / "new", config)
    assert read_model_config(tmp_path / "new") == config
    content = json.loads((tmp_path / "new" / MODEL_CONFIG_FILE).read_text())
    assert content.keys() == ({"backbone"} if byte_side is None else {"backbone", "byte_side"})
    assert [path.name for path in (tmp_path / "new").iterdir()] == [MODEL_CONFIG_FILE]


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("backbone", {"colour": 1}, "unknown field colour"),
        ("backbone", {"num_layers": "3"}, "num_layers is '3', expected int"),
        ("backbone", {"num_layers": True}, "num_layers is True"),
        ("backbone", {"rope_scaling": [1]}, r"rope_scaling is \[1\]"),
        ("byte_side", {"byte_mixer": "lstm"}, "byte_mixer is 'lstm', expected 'mamba2' | 'conv'"),
        ("byte_side", {"conv_dilations": 3}, "conv_dilations is 3"),
        ("other", {}, "expected an object with backbone"),
    ],
)
def test_wrong_fields_are_refused(tmp_path: Path, part: str, change: dict[str, Any], message: str) -> None:
    write_model_config(tmp_path, ModelConfig(backbone=BACKBONE, byte_side=BYTE_SIDE))
    path = tmp_path / MODEL_CONFIG_FILE
    content = json.loads(path.read_text())
    content.setdefault(part, {}).update(change)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        read_model_config(tmp_path)


def test_a_missing_field_a_damaged_and_a_missing_file_are_named(tmp_path: Path) -> None:
    path = tmp_path / MODEL_CONFIG_FILE
    with pytest.raises(ValueError, match=r"has no model_config\.json"):
        read_model_config(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        read_model_config(tmp_path / "nowhere")
    path.write_text('{"backbone": {"family": "llama"}}')
    with pytest.raises(ValueError, match="missing field num_layers"):
        read_model_config(tmp_path)
    path.write_text("{")
    with pytest.raises(ValueError, match="not readable JSON"):
        read_model_config(tmp_path)
    with pytest.raises(ValueError, match="is not a directory"):
        read_model_config(path)
