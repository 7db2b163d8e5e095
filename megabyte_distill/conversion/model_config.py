"""model_config.json: what the model in a checkpoint folder is made of, written once at its root.

``{"backbone": {...}}`` for a teacher, with ``"byte_side": {...}`` as well for a student.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from megabyte_distill.config.fields import from_fields, to_fields
from megabyte_distill.config.model import BackboneConfig, ByteSideConfig
from megabyte_distill.files import write_whole

MODEL_CONFIG_FILE = "model_config.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """What model_config.json says."""

    backbone: BackboneConfig
    byte_side: ByteSideConfig | None = None
    """None for a teacher."""


def write_model_config(folder: Path, config: ModelConfig) -> None:
    """Writes ``folder/model_config.json``, complete or absent; the folder is made if needed."""
    content = {"backbone": to_fields(config.backbone)}
    if config.byte_side is not None:
        content["byte_side"] = to_fields(config.byte_side)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / MODEL_CONFIG_FILE, (json.dumps(content, indent=2) + "\n").encode())


def read_model_config(folder: Path) -> ModelConfig:
    """Reads ``folder/model_config.json``; ValueError where it is missing, damaged or has unknown or wrong fields."""
    path = folder / MODEL_CONFIG_FILE
    if not folder.is_dir():
        what = "is not a directory" if folder.exists() else "does not exist"
        raise ValueError(f"{folder} {what}; expected a converted teacher or a run's folder with {MODEL_CONFIG_FILE}")
    if not path.is_file():
        raise ValueError(
            f"{folder} has no {MODEL_CONFIG_FILE}; expected a run's folder or a teacher converted by "
            "tools/convert_checkpoint.py import"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not readable JSON ({error}); restore it or convert again") from error
    if not isinstance(content, dict) or not {"backbone"} <= content.keys() <= {"backbone", "byte_side"}:
        keys = sorted(content) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{path}: expected an object with backbone and, for a student, byte_side; got {keys}")
    byte_side = content.get("byte_side")
    return ModelConfig(
        backbone=from_fields(BackboneConfig, content["backbone"], f"{path}, backbone"),
        byte_side=None if byte_side is None else from_fields(ByteSideConfig, byte_side, f"{path}, byte_side"),
    )
