"""A Hugging Face folder turned into a converted teacher (teacher_folder.py), strictly and one parameter at a time."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megabyte_distill.config.model import BackboneConfig
from megabyte_distill.conversion.families import family_of_config
from megabyte_distill.conversion.family import Family
from megabyte_distill.conversion.hf_config import CONFIG_FILE, HfConfig
from megabyte_distill.conversion.mapping import ParameterTable
from megabyte_distill.conversion.model_config import MODEL_CONFIG_FILE
from megabyte_distill.conversion.new_folder import check_replaceable, new_folder
from megabyte_distill.conversion.parallel_sizes import check_parallel_sizes
from megabyte_distill.conversion.safetensors_folder import SafetensorsFolder
from megabyte_distill.conversion.streamed_save import StreamedSave, backbone_skeleton
from megabyte_distill.conversion.student_folder import backbone_section, check_backbone, is_student, tokenizer_of
from megabyte_distill.conversion.teacher_folder import BACKBONE_PREFIX, save_teacher
from megabyte_distill.conversion.tensor_checks import check_finite, converted, same_bits
from megabyte_distill.conversion.tokenizer_files import token_table
from megabyte_distill.data.progress import Show, silent
from megabyte_distill.model.backbone import Backbone
from megabyte_distill.training.checkpoint import CheckpointError


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
        check_finite(tensor, f"{self.weights.tensors[name].file}: {name}")
        return tensor

    def _check_repeats(self, table: ParameterTable) -> None:
        for name, origin in table.repeats.items():
            if name in self.weights.tensors and not same_bits(self.weights.read(name), self.weights.read(origin)):
                raise ValueError(
                    f"{self.weights.tensors[name].file}: {name} differs from {origin}, but "
                    f"{self.folder / CONFIG_FILE} says tie_word_embeddings: true; correct it"
                )


class ParameterSource:
    """The backbone's parameters made of a folder's tensors, one when it is asked for."""

    def __init__(self, model: HfModel, backbone: Backbone, *, show: Show = silent) -> None:
        """``backbone``: gives names, shapes and dtype; it may be on the meta device. ValueError where the folder's
        names and shapes are not those of its configuration.
        """
        table = model.table(backbone.padded_vocab_size)
        table.check_ours({name: tuple(p.shape) for name, p in backbone.named_parameters()}, "the backbone")
        self._model, self._dtype = model, backbone.dtype
        self._mappings = {mapping.ours: mapping for mapping in table.mappings}
        total = sum(torch.Size(shape).numel() for shape in table.ours().values()) * self._dtype.itemsize
        self._done = show("import", total)

    def read(self, name: str) -> Tensor:
        """A parameter by the backbone's name; ValueError where a value is not finite, or is too large for the dtype."""
        mapping = self._mappings[name]
        made = mapping.to_ours([self._model.read(theirs) for theirs in mapping.theirs])
        tensor = converted(made, self._dtype, f"{self._model.folder}: {', '.join(mapping.theirs)}")
        self._done.advance(tensor.nbytes)
        return tensor

    def close(self) -> None:
        """Ends the display."""
        self._done.close()


def import_teacher(
    hf_model: Path,
    megatron_path: Path,
    *,
    dtype: torch.dtype | None = None,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    overwrite: bool = False,
    show: Show = silent,
) -> BackboneConfig:
    """Converts ``hf_model`` into the teacher folder ``megatron_path``; on an error nothing carries that name.

    Memory stays within a few times the largest parameter, whatever the size of the model. ``dtype``: of the weights;
    default as stored, float16 as bfloat16 (which rounds: the backbone trains in one of float32 and bfloat16).
    ``tensor_parallel``, ``pipeline_parallel``: sizes that the model must be fit to be cut into; the checkpoint is the
    same for all. ValueError for everything that is wrong with the folder, the sizes or the output.
    """
    check_replaceable(megatron_path, overwrite=overwrite, marker=MODEL_CONFIG_FILE)
    model = HfModel.open(hf_model)
    tokens = token_table(model.tokenizer, model.config.vocab_size)
    chosen = dtype or (torch.bfloat16 if model.stored_dtype is torch.float16 else model.stored_dtype)
    skeleton = backbone_skeleton(model.config, chosen)
    check_parallel_sizes(model.config, tensor_parallel=tensor_parallel, pipeline_parallel=pipeline_parallel)
    with (
        contextlib.closing(ParameterSource(model, skeleton, show=show)) as source,
        new_folder(megatron_path, overwrite=overwrite, marker=MODEL_CONFIG_FILE) as folder,
    ):
        writer = StreamedSave(dict(skeleton.named_parameters()), source.read)
        try:
            save_teacher(folder, skeleton, tokens, model.tokenizer, writer=writer)
        except CheckpointError as error:
            # what is wrong with the input is no failure to save
            raise error.__cause__ if isinstance(error.__cause__, ValueError) else error from None
    return model.config
