"""A checkpoint is complete or absent, and says what is wrong with it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from megabyte_distill.parallel.process_groups import World
from megabyte_distill.parallel.process_groups import world as process_groups
from megabyte_distill.training import checkpoint as module
from megabyte_distill.training.checkpoint import (
    TRACKER,
    CheckpointError,
    find_checkpoint,
    latest_iteration,
    load_checkpoint,
    read_loop_state,
    remove_old_checkpoints,
    save_checkpoint,
)
from tests.training.older import without_manifest

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with process_groups() as current:
        yield current


def model(width: int = 4) -> nn.Module:
    return nn.Sequential(nn.Linear(3, width), nn.Linear(width, 2, bias=False)).to(DEVICE)


def save(folder: Path, iteration: int, net: nn.Module) -> Path:
    return save_checkpoint(folder, iteration, net, optimizer=None, loop={"n": iteration}, texts={"a.yaml": "x: 1"})


def test_a_saved_model_comes_back_bit_for_bit(world: World, tmp_path: Path) -> None:
    net, other = model(), model()
    path = save(tmp_path, 7, net)
    assert path == tmp_path / "iter_0000007" == find_checkpoint(tmp_path)
    assert latest_iteration(tmp_path) == 7
    assert (path / "a.yaml").read_text() == "x: 1"
    assert load_checkpoint(path, other) == {"n": 7} == read_loop_state(path)
    for ours, theirs in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_what_does_not_fit_is_named_and_nothing_is_changed(world: World, tmp_path: Path) -> None:
    path = save(tmp_path, 1, model(4))
    other = model(5)
    before = [parameter.clone() for parameter in other.parameters()]
    with pytest.raises(CheckpointError, match=r"0\.weight: \(4, 3\) in the checkpoint, \(5, 3\) in the model"):
        load_checkpoint(path, other)
    larger = nn.Sequential(*model(4), nn.Linear(2, 2)).to(DEVICE)
    with pytest.raises(CheckpointError, match=r"2\.weight: not in the checkpoint"):
        load_checkpoint(path, larger)
    assert all(torch.equal(a, b) for a, b in zip(before, other.parameters(), strict=True))


def test_missing_and_incomplete_checkpoints_are_named(world: World, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a directory"):
        find_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        find_checkpoint(tmp_path)
    save(tmp_path, 2, model())
    with pytest.raises(CheckpointError, match="iter_0000002"):
        find_checkpoint(tmp_path, 5)
    (tmp_path / TRACKER).write_text("two")
    with pytest.raises(CheckpointError, match="expected an iteration number"):
        find_checkpoint(tmp_path)


def test_an_interrupted_save_is_ignored_and_removed_by_the_next(world: World, tmp_path: Path) -> None:
    save(tmp_path, 1, model())
    leftover = tmp_path / "iter_0000002.incomplete"
    leftover.mkdir()
    (leftover / "__0_0.distcp").write_bytes(b"half")
    assert find_checkpoint(tmp_path).name == "iter_0000001"
    save(tmp_path, 2, model())
    assert not leftover.exists()
    assert find_checkpoint(tmp_path).name == "iter_0000002"


def test_a_save_that_never_reached_the_tracker_is_replaced(world: World, tmp_path: Path) -> None:
    save(tmp_path, 1, model())
    save(tmp_path, 2, model())
    (tmp_path / TRACKER).write_text("1\n")
    net, other = model(), model()
    load_checkpoint(save(tmp_path, 2, net), other)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))
    assert sorted(path.name for path in tmp_path.glob("iter_*")) == ["iter_0000001", "iter_0000002"]


@pytest.mark.parametrize("place", ["weights", "small files", "rename"])
def test_a_failed_save_leaves_the_old_checkpoint_and_no_rest(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    save(tmp_path, 1, model())

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    target = {
        "weights": (module.dist_checkpointing, "save"),
        "small files": (module, "fsync_tree"),
        "rename": (module, "_put_in_place"),
    }[place]
    with monkeypatch.context() as patched:
        patched.setattr(*target, full)
        with pytest.raises(CheckpointError, match=r"No space left on device.*earlier checkpoints are untouched"):
            save(tmp_path, 2, model())
    assert find_checkpoint(tmp_path).name == "iter_0000001"
    save(tmp_path, 2, model())
    assert sorted(path.name for path in tmp_path.glob("iter_*")) == ["iter_0000001", "iter_0000002"]


def test_what_cannot_be_read_without_a_manifest_is_named(world: World, tmp_path: Path) -> None:
    path = without_manifest(save(tmp_path, 1, model()))
    for shard in path.glob("*.distcp"):
        os.truncate(shard, shard.stat().st_size // 3)
    with (
        pytest.warns(UserWarning, match=r"has no manifest\.json and is loaded unverified"),
        pytest.raises(CheckpointError, match=r"iter_0000001 cannot be loaded.*latest_checkpointed_iteration"),
    ):
        load_checkpoint(path, model())
    (path / ".metadata").write_bytes(b"nothing")
    with pytest.warns(UserWarning), pytest.raises(CheckpointError, match="cannot be loaded"):
        load_checkpoint(path, model())


def test_a_checkpoint_of_an_earlier_version_loads_with_a_warning(world: World, tmp_path: Path) -> None:
    net, other = model(), model()
    path = without_manifest(save(tmp_path, 1, net))
    with pytest.warns(UserWarning, match="loaded unverified"):
        load_checkpoint(path, other)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))


FILES = ("__0_0_0.distcp", ".metadata", "common.pt", "metadata.json", "loop_state.json", "a.yaml")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_in_any_file_is_found(world: World, tmp_path: Path, name: str) -> None:
    save(tmp_path, 1, model())
    path = save(tmp_path, 3, model())
    flip(path / name)
    other = model()
    before = [parameter.clone() for parameter in other.parameters()]
    with pytest.raises(CheckpointError, match=r"iter_0000003 is damaged") as caught:
        load_checkpoint(path, other)
    assert f"the content of {name} has changed since it was written" in str(caught.value)
    assert "Earlier ones: 1." in str(caught.value) and "--ckpt-step 1" in str(caught.value)
    assert all(torch.equal(a, b) for a, b in zip(before, other.parameters(), strict=True))


@pytest.mark.parametrize("verify", [True, False])
def test_a_truncated_or_missing_file_is_found_also_without_hashes(world: World, tmp_path: Path, verify: bool) -> None:
    path = save(tmp_path, 1, model())
    size = (path / "__0_1_0.distcp").stat().st_size
    os.truncate(path / "__0_1_0.distcp", size - 1)
    (path / "common.pt").unlink()
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path, model(), verify=verify)
    assert f"__0_1_0.distcp has {size - 1:,} bytes instead of {size:,}" in str(caught.value)
    assert "common.pt is missing" in str(caught.value)
    assert "holds no earlier one" in str(caught.value)


def test_without_hashes_a_changed_byte_passes(world: World, tmp_path: Path) -> None:
    path = save(tmp_path, 1, model())
    flip(path / "a.yaml")
    assert load_checkpoint(path, model(), verify=False) == {"n": 1}


def test_a_lost_or_damaged_manifest_is_no_older_checkpoint(world: World, tmp_path: Path) -> None:
    path = save(tmp_path, 1, model())
    manifest = path / "manifest.json"
    manifest.write_text(manifest.read_text()[:40])
    with pytest.raises(CheckpointError, match=r"is damaged: manifest\.json cannot be read"):
        load_checkpoint(path, model())
    manifest.unlink()
    with pytest.raises(CheckpointError, match=r"is damaged: manifest\.json is missing"):
        load_checkpoint(path, model())


def test_every_file_is_listed(world: World, tmp_path: Path) -> None:
    path = save(tmp_path, 1, model())
    listed = set(json.loads((path / "manifest.json").read_text())["files"])
    assert listed == {file.name for file in path.iterdir()} - {"manifest.json"} == {*FILES, "__0_1_0.distcp"}


def test_saving_starts_no_lasting_process(world: World, tmp_path: Path) -> None:
    import psutil

    save(tmp_path, 1, model())
    names = [" ".join(child.cmdline()) for child in psutil.Process().children(recursive=True)]
    assert not [name for name in names if "spawn_main" in name], names


@pytest.mark.parametrize(
    ("keep_last", "retain_interval", "kept"), [(1, 0, [4]), (2, 0, [3, 4]), (1, 2, [2, 4]), (9, 0, [1, 2, 3, 4])]
)
def test_old_checkpoints_go_and_the_others_stay(
    world: World, tmp_path: Path, keep_last: int, retain_interval: int, kept: list[int]
) -> None:
    for iteration in (1, 2, 3, 4):
        save(tmp_path, iteration, model())
    (tmp_path / "iter_0000009").mkdir()  # beyond the latest: somebody went back, and it is not ours to judge
    removed = remove_old_checkpoints(tmp_path, keep_last=keep_last, retain_interval=retain_interval)
    assert [path.name for path in removed] == [f"iter_{n:07d}" for n in (1, 2, 3, 4) if n not in kept]
    there = sorted(path.name for path in tmp_path.glob("iter_*"))
    assert there == [f"iter_{n:07d}" for n in (*kept, 9)]
    assert latest_iteration(tmp_path) == 4 and find_checkpoint(tmp_path).name == "iter_0000004"
