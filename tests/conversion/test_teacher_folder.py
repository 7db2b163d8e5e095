"""A teacher's folder, and a run's, as load_teacher reads them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from megabyte_distill.conversion.hf_import import import_teacher
from megabyte_distill.conversion.model_config import MODEL_CONFIG_FILE
from megabyte_distill.conversion.teacher_folder import load_teacher
from megabyte_distill.model.backbone import Backbone
from megabyte_distill.training.checkpoint import CheckpointError, find_checkpoint, load_checkpoint, save_checkpoint

pytestmark = pytest.mark.usefixtures("world")


@pytest.fixture
def teacher(llama: Path, tmp_path: Path) -> Path:
    import_teacher(llama, tmp_path / "ckpt")
    return tmp_path / "ckpt"


class SmallStudent(nn.Module):
    """A module beside the backbone, as the student has."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.encoder = nn.Linear(3, 3)
        self.backbone = backbone


def test_the_folder_has_the_documented_layout(teacher: Path) -> None:
    assert sorted(path.name for path in teacher.iterdir()) == [
        "iter_0000000", "latest_checkpointed_iteration.txt", "model_config.json", "tokenizer"
    ]  # fmt: skip
    assert {"tokenizer.json", "tokenizer_config.json", "token_bytes.npz", "config.json"} <= {
        path.name for path in (teacher / "tokenizer").iterdir()
    }


def test_a_student_takes_its_backbone_from_the_folder_and_keeps_the_rest(teacher: Path) -> None:
    loaded = load_teacher(teacher)
    student = SmallStudent(Backbone(loaded.config))
    before = student.encoder.weight.clone()
    load_checkpoint(find_checkpoint(teacher), student, prefix="backbone.")
    assert torch.equal(student.encoder.weight, before)
    for one, other in zip(student.backbone.parameters(), loaded.backbone.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_backbone_of_a_run_is_loaded_from_its_stage(teacher: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(teacher / MODEL_CONFIG_FILE, run)
    shutil.copytree(teacher / "tokenizer", run / "tokenizer")
    student = SmallStudent(load_teacher(teacher).backbone)
    save_checkpoint(run / "1b", 7, student, optimizer=None, loop={}, texts={})
    loaded = load_teacher(run / "1b")
    for one, other in zip(student.backbone.parameters(), loaded.backbone.parameters(), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(ValueError, match="is a run with the stages 1b; name one"):
        load_teacher(run)


def test_a_folder_that_is_no_teacher_is_refused(llama: Path, teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        load_teacher(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"has no model_config\.json"):
        load_teacher(llama)
    (teacher / "latest_checkpointed_iteration.txt").unlink()
    with pytest.raises(ValueError, match="no complete checkpoint"):
        load_teacher(teacher)


def test_weights_that_do_not_fit_the_model_config_are_refused(teacher: Path) -> None:
    path = teacher / MODEL_CONFIG_FILE
    path.write_text(path.read_text().replace('"ffn_hidden_size": 56', '"ffn_hidden_size": 64'))
    with pytest.raises(CheckpointError, match="does not fit the model"):
        load_teacher(teacher)
