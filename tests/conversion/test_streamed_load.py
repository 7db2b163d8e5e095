"""Parameters read one at a time are those of the checkpoint; what is damaged or does not fit is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from megabyte_distill.conversion.hf_export import export_teacher
from megabyte_distill.conversion.hf_import import import_teacher
from megabyte_distill.conversion.model_config import MODEL_CONFIG_FILE
from megabyte_distill.conversion.streamed_load import StoredParameters
from megabyte_distill.conversion.streamed_save import backbone_skeleton
from megabyte_distill.conversion.teacher_folder import TeacherHolder, find_teacher, load_teacher
from megabyte_distill.model.backbone import Backbone
from megabyte_distill.training.checkpoint import CheckpointError, save_checkpoint
from tests.training.older import without_manifest

pytestmark = pytest.mark.usefixtures("world")


@pytest.fixture
def teacher(llama: Path, tmp_path: Path) -> Path:
    import_teacher(llama, tmp_path / "ckpt")
    return tmp_path / "ckpt"


def test_each_parameter_is_that_of_a_whole_load(teacher: Path) -> None:
    stored = find_teacher(teacher)
    reader = StoredParameters(stored.checkpoint, TeacherHolder(backbone_skeleton(stored.config, torch.float32)))
    for name, parameter in load_teacher(teacher).backbone.named_parameters():
        assert torch.equal(reader.read(f"backbone.{name}"), parameter), name


class SmallStudent(nn.Module):
    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.encoder = nn.Linear(3, 3)
        self.backbone = backbone


def test_the_backbone_of_a_stage_is_exported(llama: Path, teacher: Path, tmp_path: Path) -> None:
    student = SmallStudent(load_teacher(teacher).backbone)
    save_checkpoint(teacher / "1b", 7, student, optimizer=None, loop={"x": 1}, texts={"run_config.yaml": "a: 1\n"})
    export_teacher(teacher / "1b", tmp_path / "hf")
    before, after = (load_file(path / "model.safetensors") for path in (llama, tmp_path / "hf"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_export_has_the_asked_dtype(llama: Path, teacher: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    export_teacher(teacher, tmp_path / "hf", dtype=dtype)
    before, after = (load_file(path / "model.safetensors") for path in (llama, tmp_path / "hf"))
    assert all(torch.equal(before[name].to(dtype), after[name]) for name in before)
    assert {tensor.dtype for tensor in after.values()} == {dtype}
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize(
    ("value", "dtype", "says"),
    [
        (1e5, torch.float16, r"layers\.2\.mlp\.down_proj\.weight: 1 value\(s\) are beyond what float16 can hold"),
        (float("nan"), None, r"layers\.2\.mlp\.down_proj\.weight holds 1 NaN"),
    ],
)
def test_values_that_cannot_be_written_are_named(
    teacher: Path, tmp_path: Path, value: float, dtype: torch.dtype | None, says: str
) -> None:
    backbone = load_teacher(teacher).backbone
    with torch.no_grad():
        backbone.decoder.layers[2].mlp.linear_fc2.weight[1, 1] = value
    save_checkpoint(teacher / "2b", 1, TeacherHolder(backbone), optimizer=None, loop={}, texts={})
    with pytest.raises(ValueError, match=says):
        export_teacher(teacher / "2b", tmp_path / "hf", dtype=dtype)
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt"]


def test_a_damaged_file_is_named_and_nothing_is_written(teacher: Path, tmp_path: Path) -> None:
    checkpoint = find_teacher(teacher).checkpoint
    largest = max(checkpoint.glob("*.distcp"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    with pytest.raises(CheckpointError, match=r"iter_0000000 is damaged: \S+\.distcp has \S+ bytes instead of"):
        export_teacher(teacher, tmp_path / "hf")
    without_manifest(checkpoint)
    with (
        pytest.warns(UserWarning, match="loaded unverified"),
        pytest.raises(CheckpointError, match=r"backbone\.\S+ of \S+iter_0000000 cannot be loaded .*damaged"),
    ):
        export_teacher(teacher, tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (('"num_layers": 4', '"num_layers": 5'), r"layers\.0\.input_layernorm\.weight: \(4, 48\) in the checkpoint"),
        (('"vocab_size": 200', '"vocab_size": 300'), r"embedding\.weight: \(256, 48\) in the checkpoint, \(384, 48\)"),
        (('"tied_embeddings": false', '"tied_embeddings": true'), r"which has no backbone\.output_layer\.weight"),
    ],
)
def test_a_model_config_of_another_model_is_refused(
    teacher: Path, tmp_path: Path, change: tuple[str, str], says: str
) -> None:
    path = teacher / MODEL_CONFIG_FILE
    assert change[0] in path.read_text()
    path.write_text(path.read_text().replace(*change))
    with pytest.raises(CheckpointError, match=says):
        export_teacher(teacher, tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt"]
