"""A streamed import is the checkpoint that a save from memory makes; only how chunks share files may differ."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.multiprocessing.reductions import StorageWeakRef

from megabyte_distill.config.model import BackboneConfig, QkNorm
from megabyte_distill.conversion.hf_import import HfModel, import_teacher
from megabyte_distill.conversion.streamed_save import StreamedSave, backbone_skeleton
from megabyte_distill.conversion.teacher_folder import TeacherHolder, load_teacher, save_teacher
from megabyte_distill.model.backbone import Backbone
from megabyte_distill.training.checkpoint import CheckpointError, find_checkpoint, load_checkpoint, save_checkpoint
from tests.conversion.in_memory import read_backbone

pytestmark = pytest.mark.usefixtures("world")

SHAPES: dict[str, dict[str, Any]] = {
    "llama": {},
    "head-norm": {"qk_norm": QkNorm.HEAD, "tied_embeddings": True},
    "full-norm-behind": {"qk_norm": QkNorm.FULL, "post_norm": True},
    "norms-around": {"sandwich_norm": True, "zero_centred_norms": True},
    "biases": {"qkv_bias": True},
}


def small_config(**fields: Any) -> BackboneConfig:
    base: dict[str, Any] = {
        "family": "llama", "num_layers": 3, "hidden_size": 48, "ffn_hidden_size": 56, "num_attention_heads": 6,
        "num_query_groups": 2, "head_dim": 16, "vocab_size": 200, "norm_eps": 1e-4, "rope_theta": 5e4,
    }  # fmt: skip
    return BackboneConfig(**{**base, **fields})


def save_both(folder: Path, backbone: Backbone) -> tuple[Path, Path]:
    """The checkpoints of one backbone: saved from memory, streamed."""
    skeleton = backbone_skeleton(backbone.backbone_config, backbone.dtype)
    values = dict(backbone.named_parameters())
    writer = StreamedSave(dict(skeleton.named_parameters()), lambda name: values[name].detach())
    for name, model, how in (("memory", backbone, None), ("streamed", skeleton, writer)):
        save_checkpoint(folder / name, 0, TeacherHolder(model), optimizer=None, loop={}, texts={}, writer=how)
    return find_checkpoint(folder / "memory"), find_checkpoint(folder / "streamed")


def described(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint's metadata says, without where in which file."""
    metadata = FileSystemReader(checkpoint).read_metadata()
    found: dict[str, Any] = {"stored": {(index.fqn, index.offset) for index in metadata.storage_data}}
    for key, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            found[key] = entry.size, entry.properties, sorted((c.offsets, c.sizes) for c in entry.chunks)
        else:
            found[key] = type(entry).__name__
    return found


@pytest.mark.parametrize("shape", SHAPES)
def test_streamed_equals_saved_from_memory(tmp_path: Path, shape: str) -> None:
    backbone = Backbone(small_config(**SHAPES[shape])).to(torch.bfloat16)
    for parameter in backbone.parameters():
        torch.nn.init.normal_(parameter)
    memory, streamed = save_both(tmp_path, backbone)
    assert described(streamed) == described(memory)
    assert (streamed / "metadata.json").read_text() == (memory / "metadata.json").read_text()
    common = [dist_checkpointing.load_common_state_dict(str(path)) for path in (memory, streamed)]
    assert common[0].keys() == common[1].keys()
    names = [{path.name for path in folder.iterdir() if path.suffix != ".distcp"} for folder in (memory, streamed)]
    assert names[0] == names[1]
    for one, other in zip(*(load_into_fresh(path, backbone).parameters() for path in (memory, streamed)), strict=True):
        assert torch.equal(one, other)
    for one, other in zip(load_into_fresh(streamed, backbone).parameters(), backbone.parameters(), strict=True):
        assert torch.equal(one, other)


def load_into_fresh(checkpoint: Path, like: Backbone) -> Backbone:
    fresh = Backbone(like.backbone_config).to(like.dtype)
    load_checkpoint(checkpoint, TeacherHolder(fresh))
    return fresh


def test_an_import_is_what_saving_the_model_in_memory_makes(make_llama: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_llama(dtype=torch.bfloat16, shard="40KB")
    import_teacher(folder, tmp_path / "streamed")
    model = HfModel.open(folder)
    save_teacher(tmp_path / "memory", read_backbone(model), load_teacher(tmp_path / "streamed").token_bytes, folder)
    checkpoints = [find_checkpoint(tmp_path / name) for name in ("memory", "streamed")]
    assert described(checkpoints[0]) == described(checkpoints[1])
    files = [sorted(p.relative_to(tmp_path / name) for p in (tmp_path / name).rglob("*") if p.suffix != ".distcp")
             for name in ("memory", "streamed")]  # fmt: skip
    assert files[0] == files[1]
    for name in ("model_config.json", "latest_checkpointed_iteration.txt", "iter_0000000/loop_state.json"):
        assert json.loads((tmp_path / "memory" / name).read_text()) == json.loads(
            (tmp_path / "streamed" / name).read_text()
        )


def test_each_parameter_is_read_once_and_given_up_soon(tmp_path: Path) -> None:
    skeleton = backbone_skeleton(small_config(num_layers=6), torch.float32)
    parameters = dict(skeleton.named_parameters())
    assert {p.device.type for p in parameters.values()} == {"meta"}
    given: list[tuple[str, StorageWeakRef]] = []
    alive = []

    def read(name: str) -> torch.Tensor:
        alive.append(sum(not storage.expired() for _, storage in given))
        made = torch.ones(parameters[name].shape)
        given.append((name, StorageWeakRef(made.untyped_storage())))
        return made

    writer = StreamedSave(parameters, read)
    save_checkpoint(tmp_path, 0, TeacherHolder(skeleton), optimizer=None, loop={}, texts={}, writer=writer)
    assert sorted(name for name, _ in given) == sorted(parameters)
    assert max(alive) <= 1, alive  # torch keeps what it wrote last


def test_an_error_while_reading_is_told_as_it_is_and_leaves_nothing(tmp_path: Path) -> None:
    skeleton = backbone_skeleton(small_config(), torch.float32)

    def read(name: str) -> torch.Tensor:
        if "layers.1" in name:
            raise ValueError(f"{name} is unreadable")
        return torch.zeros(dict(skeleton.named_parameters())[name].shape)

    writer = StreamedSave(dict(skeleton.named_parameters()), read)
    with pytest.raises(CheckpointError, match=r"layers\.1\.\S+ is unreadable") as caught:
        save_checkpoint(tmp_path / "c", 0, TeacherHolder(skeleton), optimizer=None, loop={}, texts={}, writer=writer)
    assert type(caught.value.__cause__) is ValueError
    assert list((tmp_path / "c").iterdir()) == []


def test_an_interrupt_is_no_error_and_leaves_nothing(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: HfModel, name: str) -> torch.Tensor:
        raise KeyboardInterrupt

    monkeypatch.setattr(HfModel, "read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        import_teacher(llama, tmp_path / "ckpt")
    assert list(tmp_path.iterdir()) == []
