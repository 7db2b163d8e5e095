"""A converted teacher is loaded at any sizes, and exported from a checkpoint of any sizes; bad sizes are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megabyte_distill.config.model import BackboneConfig, QkNorm
from megabyte_distill.conversion.hf_export import export_teacher
from megabyte_distill.conversion.hf_import import import_teacher
from megabyte_distill.conversion.parallel_sizes import check_parallel_sizes
from tests.pretrain.job import run_as_ranks

PROGRAM = Path(__file__).with_name("resave.py")


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize(("tensor", "pipeline", "tied"), [(2, 1, False), (1, 2, False), (1, 2, True)])
def test_import_resaved_at_other_sizes_exports_the_same_bits(
    make_llama: Callable[..., Path], tmp_path: Path, tensor: int, pipeline: int, tied: bool
) -> None:
    folder = make_llama(dtype=torch.bfloat16, tie_word_embeddings=tied)
    one, other = tmp_path / "one", tmp_path / "other"
    import_teacher(folder, one, tensor_parallel=tensor, pipeline_parallel=pipeline)
    done = run_as_ranks(str(PROGRAM), str(one), str(other), str(tensor), str(pipeline), processes=2)
    assert done.returncode == 0, done.stderr
    export_teacher(other, tmp_path / "hf")
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "hf"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def config(**fields: Any) -> BackboneConfig:
    base: dict[str, Any] = {
        "family": "llama", "num_layers": 6, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 8,
        "num_query_groups": 2, "head_dim": 8, "vocab_size": 200, "norm_eps": 1e-5, "rope_theta": 1e4,
    }  # fmt: skip
    return BackboneConfig(**{**base, **fields})


@pytest.mark.parametrize(
    ("tensor", "pipeline", "fields"),
    [
        (1, 1, {}),
        (2, 3, {}),
        (8, 6, {}),
        (2, 1, {"qk_norm": QkNorm.FULL}),
        (1, 2, {"virtual": {"virtual_stages": 3}}),
        (1, 2, {"virtual": {"layers_per_virtual_stage": 1}}),
        (1, 2, {"virtual": {"align_layers": 3}}),
        (1, 2, {"virtual": {"align_layers": 1, "virtual_stages": 3}}),
    ],
)
def test_sizes_that_fit_are_accepted(tensor: int, pipeline: int, fields: dict[str, Any]) -> None:
    virtual = fields.pop("virtual", {})
    check_parallel_sizes(config(**fields), tensor_parallel=tensor, pipeline_parallel=pipeline, **virtual)


@pytest.mark.parametrize(
    ("tensor", "pipeline", "fields", "says"),
    [
        (
            *(3, 4, {"ffn_hidden_size": 100}),
            [
                "attention heads 8 is not divisible by --tp 3",
                "MLP's width 100 is not divisible by --tp 3",
                "padded vocabulary 256 is not divisible by --tp 3",
                "query groups 2 neither divides --tp 3 nor is divisible by it",
                "layers 6 is not divisible by --pp 4",
            ],
        ),
        (1, 2, {"virtual": {"virtual_stages": 2}}, ["layers 3 of a pipeline rank is not divisible by --num-virtual"]),
        (
            1,
            2,
            {"virtual": {"layers_per_virtual_stage": 2}},
            ["layers 3", "by --num-layers-per-virtual-pipeline-stage 2"],
        ),
        (1, 1, {"virtual": {"align_layers": 7}}, ["so: --align-layers 7 is more than the 6 layers; choose"]),
        (
            *(3, 2, {"virtual": {"align_layers": 4}}),
            [
                "attention heads 8 is",
                "--align-layers 4 is more than the 3 layers of the first pipeline stage, on which",
            ],
        ),
        (1, 2, {"virtual": {"align_layers": 2, "virtual_stages": 3}}, ["more than the 1 layers of the first"]),
        (
            1,
            2,
            {"virtual": {"align_layers": 2, "layers_per_virtual_stage": 1}},
            ["more than the 1 layers of the first"],
        ),
        (4, 1, {"qk_norm": QkNorm.FULL}, ["query groups 2 is not divisible by --tp 4"]),
        (0, 1, {}, ["--tp is 0"]),
        (1, -1, {}, ["--pp is -1"]),
    ],
)
def test_sizes_that_do_not_fit_are_named_all_at_once(
    tensor: int, pipeline: int, fields: dict[str, Any], says: list[str]
) -> None:
    virtual = fields.pop("virtual", {})
    with pytest.raises(ValueError) as caught:
        check_parallel_sizes(config(**fields), tensor_parallel=tensor, pipeline_parallel=pipeline, **virtual)
    assert all(part in str(caught.value) for part in says), caught.value
