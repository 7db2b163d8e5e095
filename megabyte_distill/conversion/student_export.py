"""A student written as a Hugging Face folder that carries its own code (student_folder.py)."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from megabyte_distill.config.ranges import BOUNDARY_THRESHOLD, COUNT
from megabyte_distill.conversion.families import family_named
from megabyte_distill.conversion.flat_sources import flat_sources
from megabyte_distill.conversion.hf_config import CONFIG_FILE
from megabyte_distill.conversion.hf_export import hf_config_of, write_json
from megabyte_distill.conversion.model_config import ModelConfig
from megabyte_distill.conversion.new_folder import EXPORT_MARKER, check_replaceable, new_folder
from megabyte_distill.conversion.safetensors_folder import write_tensors
from megabyte_distill.conversion.student_folder import (
    BACKBONE_TOKENIZER,
    config_fields,
    generation_fields,
    tokenizer_fields,
)
from megabyte_distill.conversion.teacher_folder import BACKBONE_PREFIX
from megabyte_distill.conversion.tokenizer_files import GENERATION_FILE, copy_files, token_table
from megabyte_distill.data.progress import Show, counted, silent
from megabyte_distill.model.backbone import Backbone
from megabyte_distill.model.student import Student


def export_student(
    student: Student,
    config: ModelConfig,
    tokenizer: Path,
    hf_path: Path,
    *,
    dtype: torch.dtype,
    paths: int = 4,
    boundary_threshold: float | None = None,
    overwrite: bool = False,
    show: Show = silent,
) -> None:
    """Writes ``hf_path``.

    Args:
        student: around megatron's Backbone, whole in this process (tensor and pipeline parallel size 1).
        config: what it is made of.
        tokenizer: folder of the teacher's tokenizer.
        hf_path: complete or absent.
        dtype: of all weights.
        paths: bit histories K of the causal byte filter that stock tools see.
        boundary_threshold: of ``generate_bytes``, as ``Sampling.boundary_threshold``.
        overwrite: replace an earlier output.
        show: displays how far the weights are.

    Raises:
        ValueError: for a student in official dechunk mode, fewer than one path, a threshold that no probability is
            compared with, an output that exists.
    """
    check_replaceable(hf_path, overwrite=overwrite, marker=EXPORT_MARKER)
    if student.is_official:
        raise ValueError(
            "a student with --dechunk-mode official reads one byte ahead, so it cannot be stepped and is no causal "
            "model: it cannot be exported; train stage 2 with --dechunk-mode hard or causal"
        )
    COUNT.require("paths", paths)
    if boundary_threshold is not None:
        BOUNDARY_THRESHOLD.require("boundary_threshold", boundary_threshold)
    backbone_config = hf_config_of(
        config.backbone, token_table(tokenizer, config.backbone.vocab_size), dtype, tokenizer
    )
    shapes, tensors = _tensors(student)
    total = dtype.itemsize * sum(math.prod(shape) for shape in shapes.values())
    with (
        contextlib.closing(show("export", total)) as done,
        new_folder(hf_path, overwrite=overwrite, marker=EXPORT_MARKER) as folder,
    ):
        for name, text in flat_sources().items():
            (folder / name).write_text(text, encoding="utf-8")
        copy_files(tokenizer, folder / BACKBONE_TOKENIZER)
        name = str(dtype).removeprefix("torch.")
        fields = config_fields(config, backbone_config, name, paths=paths, boundary_threshold=boundary_threshold)
        write_json(folder / CONFIG_FILE, fields)
        write_json(folder / GENERATION_FILE, generation_fields())
        write_json(folder / "tokenizer_config.json", tokenizer_fields(config))
        write_tensors(
            folder,
            {name: (shape, dtype) for name, shape in shapes.items()},
            counted(tensors, done, lambda pair: pair[1].numel() * dtype.itemsize),
        )


def _tensors(student: Student) -> tuple[dict[str, tuple[int, ...]], Iterator[tuple[str, Tensor]]]:
    """(names and shapes, the tensors in the same order, one at a time) of an exported student."""
    backbone = student.backbone
    assert isinstance(backbone, Backbone)
    table = family_named(backbone.backbone_config.family).table(backbone.backbone_config, backbone.padded_vocab_size)
    ours = dict(backbone.named_parameters())
    table.check_ours({name: tuple(tensor.shape) for name, tensor in ours.items()}, "the backbone")
    byte_side = {n: p.detach() for n, p in student.named_parameters() if not n.startswith(BACKBONE_PREFIX)}
    shapes = {name: tuple(tensor.shape) for name, tensor in byte_side.items()}
    shapes |= {f"{BACKBONE_PREFIX}{name}": shape for name, shape in table.theirs().items()}
    converted = ((f"{BACKBONE_PREFIX}{name}", tensor) for name, tensor in table.to_theirs(lambda name: ours[name]))
    return shapes, itertools.chain(byte_side.items(), converted)
