"""A Hugging Face folder turned into a converted teacher (teacher_folder.py), strictly and one tensor at a time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from megabyte_distill.config.model import BackboneConfig
from megabyte_distill.conversion.families import family_of_config
from megabyte_distill.conversion.family import Family
from megabyte_distill.conversion.hf_config import HfConfig
from megabyte_distill.conversion.mapping import ParameterTable
from megabyte_distill.conversion.model_config import MODEL_CONFIG_FILE
from megabyte_distill.conversion.new_folder import check_replaceable, new_folder
from megabyte_distill.conversion.safetensors_folder import SafetensorsFolder
from megabyte_distill.conversion.student_folder import backbone_section, check_backbone, is_student, tokenizer_of
from megabyte_distill.conversion.teacher_folder import BACKBONE_PREFIX, save_teacher
from megabyte_distill.conversion.tokenizer_files import token_table
from megabyte_distill.model.backbone import Backbone, transformer_config


@dataclass(frozen=True, slots=True)
class HfModel:
    """A Hugging Face folder whose configuration is understood; its weights are not read yet."""

    folder: Path
    family: Family
    config: BackboneConfig
    weights: SafetensorsFolder
    tokenizer: Path
    """Folder of the tokenizer's files."""

    @classmethod
    def open(cls, folder: Path) -> HfModel:
        """A token model, or the backbone of an exported student.

        ValueError where the folder is not there, incomplete or of an unknown or unsupported architecture.
        """
        fields = HfConfig.read(folder)
        if is_student(fields):
            return cls._backbone_of(folder, fields)
        family = family_of_config(fields)
        return cls(folder, family, family.read_config(fields), SafetensorsFolder(folder), folder)

    @classmethod
    def _backbone_of(cls, folder: Path, student: HfConfig) -> HfModel:
        fields = backbone_section(student)
        family = family_of_config(fields)
        config = family.read_config(fields)
        check_backbone(student, config)
        return cls(folder, family, config, SafetensorsFolder(folder, BACKBONE_PREFIX), tokenizer_of(folder))

    @property
    def stored_dtype(self) -> torch.dtype:
        """The narrowest dtype that holds every tensor exactly."""
        dtypes = {info.dtype for info in self.weights.tensors.values()}
        return dtypes.pop() if len(dtypes) == 1 else torch.float32

    def table(self, padded_vocab_size: int) -> ParameterTable:
        """The family's table, checked against names and shapes of the weights."""
        table = self.family.table(self.config, padded_vocab_size)
        table.check_theirs(self.weights.shapes(), str(self.folder))
        self._check_repeats(table)
        return table

    def read(self, name: str) -> Tensor:
        """A tensor as stored; ValueError where it holds NaN or infinity."""
        tensor = self.weights.read(name)
        if not torch.isfinite(tensor).all():
            bad = int((~torch.isfinite(tensor)).sum())
            raise ValueError(f"{self.weights.tensors[name].file}: {name} holds {bad} NaN or infinite value(s)")
        return tensor

    def _check_repeats(self, table: ParameterTable) -> None:
        for name, origin in table.repeats.items():
            if name in self.weights.tensors and not torch.equal(self.weights.read(name), self.weights.read(origin)):
                raise ValueError(
                    f"{self.folder}: {name} differs from {origin}, but config.json says tie_word_embeddings: true; "
                    "correct config.json"
                )


def read_backbone(model: HfModel, *, dtype: torch.dtype | None = None, progress: bool = False) -> Backbone:
    """A backbone with the folder's weights, in ``dtype`` (default: the folder's). Needs process groups, sizes 1."""
    config = model.config
    backbone = Backbone(config, transformer_config(config, perform_initialization=False))
    backbone.to(dtype or model.stored_dtype)
    table = model.table(backbone.padded_vocab_size)
    parameters = dict(backbone.named_parameters())
    table.check_ours({name: tuple(p.shape) for name, p in parameters.items()}, "the backbone")
    bar = tqdm(table.to_ours(model.read), total=len(table.mappings), unit="tensor", disable=not progress)
    with torch.no_grad():
        for name, tensor in bar:
            parameters.pop(name).copy_(tensor)
    assert not parameters, sorted(parameters)
    return backbone


def import_teacher(
    hf_model: Path,
    megatron_path: Path,
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> BackboneConfig:
    """Converts ``hf_model`` into the teacher folder ``megatron_path``; on an error nothing carries that name.

    ``dtype``: of the weights; default as stored, float16 as bfloat16 (which rounds: the backbone trains in one of
    float32 and bfloat16). ValueError for everything that is wrong with the folder or the output.
    """
    check_replaceable(megatron_path, overwrite=overwrite, marker=MODEL_CONFIG_FILE)
    model = HfModel.open(hf_model)
    tokens = token_table(model.tokenizer, model.config.vocab_size)
    chosen = dtype or (torch.bfloat16 if model.stored_dtype is torch.float16 else model.stored_dtype)
    backbone = read_backbone(model, dtype=chosen, progress=progress)
    with new_folder(megatron_path, overwrite=overwrite, marker=MODEL_CONFIG_FILE) as folder:
        save_teacher(folder, backbone, tokens, model.tokenizer)
    return model.config
