"""An exported student read back by this package: neither transformers nor the folder's own code runs."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from megabyte_distill.config.fields import from_fields
from megabyte_distill.config.model import BackboneConfig, ByteSideConfig
from megabyte_distill.conversion.hf_config import HfConfig
from megabyte_distill.conversion.safetensors_folder import SafetensorsFolder
from megabyte_distill.conversion.student_folder import is_student
from megabyte_distill.hf.torch_backbone import TorchBackbone
from megabyte_distill.model.student import Student


def load_exported(folder: str | os.PathLike[str], device: torch.device | str = "cpu") -> Student:
    """The student that ``convert_checkpoint.py export`` wrote, in evaluation mode, weights in their own dtype.

    ValueError where the folder is no export, is damaged, or holds other weights than its config.json describes.
    """
    folder = Path(folder)
    config = HfConfig.read(folder)
    if not is_student(config):
        kind = config.fields.get("model_type")
        raise ValueError(
            f"{folder} holds a Hugging Face model of type {kind!r}, not an exported student (megabyte); import it as a "
            "teacher and train a student from it, or give a run or the folder of an export"
        )
    byte_side = from_fields(ByteSideConfig, config.fields.get("byte_side") or {}, f"{config.where}, byte_side")
    backbone = from_fields(BackboneConfig, config.fields.get("backbone") or {}, f"{config.where}, backbone")
    with torch.device("meta"):  # the weights below take the places of these
        student = Student(byte_side, TorchBackbone(backbone))
    stored = SafetensorsFolder(folder)
    wanted = {name: tuple(tensor.shape) for name, tensor in student.state_dict().items()}
    found = stored.shapes()
    if wanted != found:
        wrong = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        raise ValueError(
            f"{folder}: the weights do not fit config.json ({len(wrong)} missing, extra or of another shape: "
            f"{', '.join(wrong[:4])}); export again"
        )
    student.load_state_dict({name: stored.read(name).to(device) for name in wanted}, assign=True)
    return student.requires_grad_(False).eval()
