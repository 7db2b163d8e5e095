"""A converted teacher on disk: written by conversion, read by training.

A run's root has the same first two entries::

    CKPT/model_config.json                       see model_config.py
    CKPT/tokenizer/                              the tokenizer's files, config.json and token_bytes.npz (W entries)
    CKPT/latest_checkpointed_iteration.txt       "0"
    CKPT/iter_0000000/                           torch_dist; every model key starts with "backbone."
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from megatron.core import dist_checkpointing
from megatron.core.transformer import TransformerConfig
from torch import nn

from megabyte_distill.config.model import BackboneConfig
from megabyte_distill.conversion.hf_config import CONFIG_FILE
from megabyte_distill.conversion.model_config import (
    MODEL_CONFIG_FILE,
    ModelConfig,
    read_model_config,
    write_model_config,
)
from megabyte_distill.conversion.streamed_load import StoredParameters
from megabyte_distill.conversion.tokenizer_files import TOKEN_BYTES_FILE, TOKENIZER_FOLDER, copy_files, token_table
from megabyte_distill.data.token_bytes import TokenBytes
from megabyte_distill.model.backbone import Backbone, transformer_config
from megabyte_distill.parallel.pipeline import built_in_stages, joined, virtual_stages
from megabyte_distill.parallel.process_groups import current_world
from megabyte_distill.training.checkpoint import (
    TRACKER,
    find_checkpoint,
    latest_iteration,
    load_checkpoint,
    save_checkpoint,
)
from megabyte_distill.training.checkpoint_writer import CheckpointWriter

BACKBONE_PREFIX = "backbone."
_STAGE_NAME = "teacher"


class TeacherHolder(nn.Module):
    """Gives a backbone's parameters the names they have inside a student: ``backbone.*``."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone


class Teacher(NamedTuple):
    """What :func:`load_teacher` returns."""

    backbone: Backbone
    config: BackboneConfig
    token_bytes: TokenBytes


class StoredTeacher(NamedTuple):
    """What :func:`find_teacher` returns: everything but the weights."""

    checkpoint: Path
    """The iter_* folder with the weights."""
    config: BackboneConfig
    token_bytes: TokenBytes
    tokenizer: Path
    """Folder with the tokenizer's files."""


def save_teacher(
    folder: Path,
    backbone: Backbone,
    token_bytes: TokenBytes,
    tokenizer_source: Path,
    *,
    writer: CheckpointWriter | None = None,
) -> None:
    """Writes the layout above into ``folder``, weights in the backbone's dtype.

    ``writer``: as in ``save_checkpoint``. Collective: every rank calls it, rank 0 writes the small files.
    """
    if torch.distributed.get_rank() == 0:
        write_tokenizer(folder, token_bytes, tokenizer_source)
        write_model_config(folder, ModelConfig(backbone=backbone.backbone_config))
    loop = {"stage": _STAGE_NAME, "iteration": 0}
    save_checkpoint(folder, 0, TeacherHolder(backbone), optimizer=None, loop=loop, texts={}, writer=writer)


def write_tokenizer(root: Path, token_bytes: TokenBytes, source: Path) -> None:
    """``root/tokenizer``: the tokenizer's files of the folder ``source`` and the token table."""
    target = root / TOKENIZER_FOLDER
    copy_files(source, target, also=(CONFIG_FILE,))
    token_bytes.save(target / TOKEN_BYTES_FILE)


def find_root(folder: Path) -> Path:
    """Where model_config.json lies: ``folder``, or the one above it for a stage of a run. ValueError if in neither."""
    above = folder.resolve().parent
    has_own = (folder / MODEL_CONFIG_FILE).is_file()
    if not has_own and (folder / TRACKER).is_file() and (above / MODEL_CONFIG_FILE).is_file():
        return above
    read_model_config(folder)  # says what is wrong with it
    return folder


def find_teacher(folder: Path) -> StoredTeacher:
    """What a converted folder, or a run's stage (RUN/1b), holds. ValueError where it is no such checkpoint."""
    root = find_root(folder)
    config = read_model_config(root).backbone
    checkpoint = _checkpoint_of(folder)
    tokenizer = root / TOKENIZER_FOLDER
    return StoredTeacher(checkpoint, config, token_table(tokenizer, config.vocab_size), tokenizer)


def load_teacher(
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    overrides: Mapping[str, object] | None = None,
    verify: bool = True,
) -> Teacher:
    """The teacher of a converted folder, or the backbone of a run's stage (RUN/1b), in ``dtype`` (default: as stored).

    ``overrides``: fields of megatron's TransformerConfig (parallel sizes, dtype); ``verify``: as in
    ``load_checkpoint``. Needs process groups
    (``parallel.process_groups.world``). ValueError where the folder is no such checkpoint or does not fit its own
    model_config.json.
    """
    _, config, tokens, _ = find_teacher(folder)
    backbone = load_teacher_stages(folder, dtype=dtype, overrides=overrides, verify=verify)
    assert isinstance(backbone, Backbone), "the teacher is cut into virtual stages"
    return Teacher(backbone, config, tokens)


def load_teacher_stages(
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    overrides: Mapping[str, object] | None = None,
    verify: bool = True,
    first_layers: int | None = None,
) -> nn.Module:
    """The backbone of :func:`load_teacher`, under virtual stages one for each of them.

    ``first_layers``: nothing but the embedding table and so many of the first layers (``Backbone.first_layers``).
    """
    checkpoint, config, _, _ = find_teacher(folder)
    # every parameter is overwritten, and a missing one is an error
    fields = {"perform_initialization": False, **(overrides or {})}
    transformer: TransformerConfig = transformer_config(config, **fields)
    holders = built_in_stages(lambda number: TeacherHolder(Backbone(config, transformer, vp_stage=number)))
    dtype = dtype or stored_dtype(checkpoint)
    if first_layers is None:
        load_checkpoint(checkpoint, holders.to(dtype), prefix=BACKBONE_PREFIX, verify=verify)
    else:
        load_first_layers(checkpoint, holders, first_layers, dtype=dtype, verify=verify)
    return joined([holder.backbone for holder in virtual_stages(holders)]).to(current_world().device)


def load_first_layers(
    checkpoint: Path, holders: nn.Module, count: int, *, dtype: torch.dtype, verify: bool = True
) -> None:
    """Reduces the backbones of holders to the embedding table and the first layers, and reads no more than these."""
    for holder in virtual_stages(holders):
        holder.backbone.drop_behind(count)
        holder.to(dtype)
        stored = StoredParameters(checkpoint, holder, prefix=BACKBONE_PREFIX, is_part=True, verify=verify)
        for name, parameter in holder.named_parameters():
            parameter.data.copy_(stored.read(name))
        verify = False  # once is enough


def stored_dtype(checkpoint: Path) -> torch.dtype:
    """Dtype of the backbone's embedding table in an iter_* folder."""
    name = f"{BACKBONE_PREFIX}embedding.weight"
    stored = dist_checkpointing.load_tensors_metadata(str(checkpoint)).get(name)
    if stored is None:
        raise ValueError(f"{checkpoint} holds no {name}; expected a converted teacher or a stage of a run")
    return stored.dtype  # type: ignore[no-any-return]


def _checkpoint_of(folder: Path) -> Path:
    if latest_iteration(folder) is None:
        stages = sorted(tracker.parent.name for tracker in folder.glob(f"*/{TRACKER}"))
        if stages:
            raise ValueError(
                f"{folder} is a run with the stages {', '.join(stages)}; name one, as {folder / stages[-1]}"
            )
    return find_checkpoint(folder)
