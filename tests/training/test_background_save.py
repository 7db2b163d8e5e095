"""A save beside the training: of the state as it was, absent until it is complete, and the same files."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from megabyte_distill.parallel.process_groups import World
from megabyte_distill.parallel.process_groups import world as process_groups
from megabyte_distill.training import saving
from megabyte_distill.training.checkpoint import (
    CheckpointError,
    PendingSave,
    begin_save,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from megabyte_distill.training.checkpoint_writer import CheckpointWriter

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with process_groups() as current:
        yield current


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2, bias=False)).to(DEVICE)


class HeldStorage(FileSystemWriter):
    """A disk that does not begin before ``gate`` is set."""

    gate: threading.Event

    def write_data(self, *args: Any) -> Any:
        assert self.gate.wait(30)
        return super().write_data(*args)


class HeldWriter(CheckpointWriter):
    """Writes in the background, once it is let."""

    def __init__(self) -> None:
        super().__init__(background=True)
        self.gate = threading.Event()

    def storage(self, folder: Path) -> FileSystemWriter:
        storage = HeldStorage(folder, per_thread_copy_ahead=0)
        storage.gate = self.gate
        return storage


class FullDisk(CheckpointWriter):
    def storage(self, folder: Path) -> FileSystemWriter:
        raise OSError(28, "No space left on device")


def begin(folder: Path, iteration: int, net: nn.Module, writer: CheckpointWriter) -> PendingSave:
    loop = {"n": iteration}
    return begin_save(folder, iteration, net, optimizer=None, loop=loop, texts={"a.yaml": "x: 1"}, writer=writer)


def save(folder: Path, iteration: int, net: nn.Module) -> Path:
    return save_checkpoint(folder, iteration, net, optimizer=None, loop={"n": iteration}, texts={"a.yaml": "x: 1"})


def equal(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_what_is_saved_is_the_state_at_the_call_and_the_same_files(world: World, tmp_path: Path) -> None:
    net = model()
    at_once = save(tmp_path / "at once", 1, net)
    writer = HeldWriter()
    pending = begin(tmp_path / "beside", 1, net, writer)
    kept = model()
    kept.load_state_dict(net.state_dict())
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(1.0)  # the training goes on
    assert not pending.is_done()
    writer.gate.set()
    path = pending.finish()
    assert pending.is_done()
    load_checkpoint(path, net)
    assert equal(net, kept)
    files = {file.name: file.read_bytes() for file in path.iterdir()}
    others = {file.name: file.read_bytes() for file in at_once.iterdir()}
    assert files.keys() == others.keys()
    # torch puts an identifier and the path of each save into .metadata
    assert {name for name in files if files[name] != others[name]} == {".metadata", "manifest.json"}


def test_until_it_is_complete_the_checkpoint_before_is_the_latest(world: World, tmp_path: Path) -> None:
    save(tmp_path, 1, model())
    writer = HeldWriter()
    pending = begin(tmp_path, 2, model(), writer)
    assert find_checkpoint(tmp_path).name == "iter_0000001"
    assert [path.name for path in tmp_path.glob("iter_*2*")] == ["iter_0000002.incomplete"]
    writer.gate.set()
    pending.writer.wait()
    assert find_checkpoint(tmp_path).name == "iter_0000001", "written is not yet complete"
    pending.finish()
    assert find_checkpoint(tmp_path).name == "iter_0000002"


@pytest.mark.parametrize("background", [True, False])
def test_a_disk_that_fills_up_meanwhile_leaves_the_checkpoint_before(
    world: World, tmp_path: Path, background: bool
) -> None:
    net = model()
    save(tmp_path, 1, net)
    pending = begin(tmp_path, 2, model(), FullDisk(background=background))
    with pytest.raises(CheckpointError, match=r"No space left on device.*earlier checkpoints are untouched"):
        pending.finish()
    assert [path.name for path in tmp_path.glob("iter_*")] == ["iter_0000001"]
    other = model()
    load_checkpoint(find_checkpoint(tmp_path), other)
    assert equal(net, other)


def test_a_second_save_waits_for_the_first(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writers: list[HeldWriter] = []

    def held(*, background: bool) -> HeldWriter:
        assert background
        writers.append(HeldWriter())
        return writers[-1]

    monkeypatch.setattr(saving, "CheckpointWriter", held)
    saver = saving.Saver(folder=tmp_path, world=world, background=True, keep_last_checkpoints=1)
    saver.save(1, model(), None, {"n": 1})
    assert saver.is_writing() and not list(tmp_path.glob("iter_0000001"))
    threading.Timer(0.2, writers[0].gate.set).start()
    saver.save(2, model(), None, {"n": 2})
    assert saver.is_writing() and find_checkpoint(tmp_path).name == "iter_0000001"
    writers[1].gate.set()
    saver.finish()
    saver.finish()
    assert not saver.is_writing()
    assert [path.name for path in tmp_path.glob("iter_*")] == ["iter_0000002"], "the older one goes with keep_last"
