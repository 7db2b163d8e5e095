"""A backbone written as a Hugging Face token model of its own family."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megabyte_distill.config.model import BackboneConfig
from megabyte_distill.conversion.families import family_named, family_of_config
from megabyte_distill.conversion.hf_config import CONFIG_FILE, HfConfig
from megabyte_distill.conversion.mapping import ParameterTable
from megabyte_distill.conversion.new_folder import EXPORT_MARKER, check_replaceable, new_folder
from megabyte_distill.conversion.safetensors_folder import write_tensors
from megabyte_distill.conversion.streamed_load import StoredParameters
from megabyte_distill.conversion.streamed_save import backbone_skeleton
from megabyte_distill.conversion.teacher_folder import BACKBONE_PREFIX, TeacherHolder, find_teacher, stored_dtype
from megabyte_distill.conversion.tokenizer_files import GENERATION_FILE, copy_files, token_table
from megabyte_distill.data.progress import Show, silent
from megabyte_distill.data.token_bytes import TokenBytes
from megabyte_distill.model.backbone import Backbone

_DTYPE_FIELDS = ("dtype", "torch_dtype")
"""Older readers know the second only; newer ones read both."""


def export_backbone(
    backbone: Backbone, hf_path: Path, tokenizer: Path, *, dtype: torch.dtype | None = None, overwrite: bool = False
) -> None:
    """Writes ``hf_path``: config.json, model.safetensors, generation_config.json and the tokenizer's files.

    ``tokenizer``: folder with the tokenizer (tokenizer.json or another kind); a config.json in it that describes this
    very backbone is kept as it is. ``dtype``: of the weights (default: the backbone's). ValueError where the folder
    exists without ``overwrite``, the tokenizer does not fit, or a weight is not finite (in ``dtype``). Needs the whole
    backbone in this process (tensor and pipeline parallel size 1).
    """
    config = backbone.backbone_config
    ours = dict(backbone.named_parameters())
    table = _checked_table(backbone)
    tokens = token_table(tokenizer, config.vocab_size)
    layout = dict.fromkeys(table.theirs(), dtype or backbone.dtype)
    with new_folder(hf_path, overwrite=overwrite, marker=EXPORT_MARKER) as folder:
        _write_small_files(folder, config, tokens, dtype or backbone.dtype, tokenizer)
        _write_weights(folder, table, layout, lambda name: ours[name])


def export_teacher(
    megatron_path: Path,
    hf_path: Path,
    *,
    dtype: torch.dtype | None = None,
    dtypes: Mapping[str, torch.dtype] | None = None,
    overwrite: bool = False,
    show: Show = silent,
) -> None:
    """Writes the backbone of a converted teacher, or of a run's stage (RUN/1b), as a Hugging Face folder.

    ``dtype``: of the weights (default: as stored); ``dtypes``: of single tensors, by Hugging Face name. Parameters are
    read one after the other, so memory stays within a few times the largest. ValueError as :func:`export_backbone`, and
    where the checkpoint does not fit its model_config.json or a part of it cannot be read.
    """
    check_replaceable(hf_path, overwrite=overwrite, marker=EXPORT_MARKER)
    checkpoint, config, tokens, tokenizer = find_teacher(megatron_path)
    skeleton = backbone_skeleton(config, stored_dtype(checkpoint))
    table = _checked_table(skeleton)
    stored = StoredParameters(checkpoint, TeacherHolder(skeleton), prefix=BACKBONE_PREFIX)
    chosen = dtype or skeleton.dtype
    layout = {**dict.fromkeys(table.theirs(), chosen), **(dtypes or {})}
    total = sum(parameter.nbytes for parameter in skeleton.parameters())
    with (
        contextlib.closing(show("export", total)) as done,
        new_folder(hf_path, overwrite=overwrite, marker=EXPORT_MARKER) as folder,
    ):

        def read(name: str) -> Tensor:
            parameter = stored.read(BACKBONE_PREFIX + name)
            done.advance(parameter.nbytes)
            return parameter

        _write_small_files(folder, config, tokens, chosen, tokenizer)
        _write_weights(folder, table, layout, read)


def _checked_table(backbone: Backbone) -> ParameterTable:
    config = backbone.backbone_config
    table = family_named(config.family).table(config, backbone.padded_vocab_size)
    table.check_ours({name: tuple(tensor.shape) for name, tensor in backbone.named_parameters()}, "the backbone")
    return table


def _write_weights(
    folder: Path, table: ParameterTable, dtypes: Mapping[str, torch.dtype], read: Callable[[str], Tensor]
) -> None:
    layout = {name: (shape, dtypes[name]) for name, shape in table.theirs().items()}
    write_tensors(folder, layout, table.to_theirs(read))


def _write_small_files(
    folder: Path, config: BackboneConfig, tokens: TokenBytes, dtype: torch.dtype, tokenizer: Path
) -> None:
    copy_files(tokenizer, folder)
    write_json(folder / CONFIG_FILE, hf_config_of(config, tokens, dtype, tokenizer))
    if not (folder / GENERATION_FILE).exists():
        write_json(folder / GENERATION_FILE, _special_ids(tokens))


def hf_config_of(
    config: BackboneConfig, tokens: TokenBytes, dtype: torch.dtype, source: Path | None = None
) -> dict[str, Any]:
    """The config.json of a backbone: that of ``source`` with another dtype where it describes the same backbone."""
    name = str(dtype).removeprefix("torch.")
    if source is not None and (original := _config_that_describes(config, source)) is not None:
        present = [key for key in _DTYPE_FIELDS if key in original] or _DTYPE_FIELDS
        return {**original, **dict.fromkeys(present, name)}
    family = family_named(config.family)
    return {
        "architectures": [family.architectures[0]],
        **family.write_config(config),
        **_special_ids(tokens),
        **dict.fromkeys(_DTYPE_FIELDS, name),
    }


def _config_that_describes(config: BackboneConfig, folder: Path) -> dict[str, Any] | None:
    """The fields of the folder's config.json, None unless they are those of this very backbone."""
    try:
        original = HfConfig.read(folder)
        described = family_of_config(original).read_config(original)
    except ValueError:  # no config, or of a model that conversion does not know: not this one
        return None
    return dict(original.fields) if described == config else None


def _special_ids(tokens: TokenBytes) -> dict[str, Any]:
    return {"bos_token_id": tokens.bos_id, "eos_token_id": tokens.end_of_text_id}


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """An object as an indented JSON file."""
    path.write_text(json.dumps(dict(content), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
