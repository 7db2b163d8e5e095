"""megatron's torch_dist format, written from parameters that are made one after the other.

megatron decides what is written: a backbone without memory (:func:`backbone_skeleton`) tells names, global shapes and
offsets. Its tensors are told apart by their storage, and a part that megatron cut out of one is found by its strides,
so that the values can take its place at the moment they are written.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future
from torch.multiprocessing.reductions import StorageWeakRef

from megabyte_distill.config.model import BackboneConfig
from megabyte_distill.model.backbone import Backbone, transformer_config
from megabyte_distill.training.checkpoint_writer import CheckpointWriter, Entry, EntryPlanner, stored_chunk


def backbone_skeleton(config: BackboneConfig, dtype: torch.dtype) -> Backbone:
    """A backbone whose parameters have names, shapes and ``dtype`` but no memory. Needs process groups, sizes 1."""
    with torch.device("meta"):
        backbone: Backbone = Backbone(config, transformer_config(config, perform_initialization=False)).to(dtype)
    return backbone


class StreamedSave(CheckpointWriter):
    """A writer for ``training.checkpoint.save_checkpoint`` of a module without memory; of one process.

    The folder has the keys, shapes, chunks and small files of any other save; only the number of .distcp files
    differs, one for each key. Memory stays within a few times the largest parameter.
    """

    parts = 1

    def __init__(self, parameters: Mapping[str, Tensor], read: Callable[[str], Tensor]) -> None:
        """``parameters``: on the meta device, by name; ``read``: gives one of them with its values, same shape and
        dtype. It is called once for each name; what it raises ends the save.
        """
        super().__init__()
        self._parameters, self._read = parameters, read

    def planner(self, entries: Sequence[Entry]) -> EntryPlanner:
        return _Planner(entries, _Values(self._parameters, self._read))

    def storage(self, folder: Path) -> FileSystemWriter:
        return _FilePerKey(folder, per_thread_copy_ahead=0)


class _Values:
    """Values of meta tensors that are parameters, or views of parameters; holds one parameter at a time."""

    def __init__(self, parameters: Mapping[str, Tensor], read: Callable[[str], Tensor]) -> None:
        self._names = {_storage_of(p): name for name, p in parameters.items()}
        self._read = read
        self._held: tuple[str, Tensor] | None = None

    def of(self, view: Tensor) -> Tensor:
        name = self._names[_storage_of(view)]
        if self._held is None or self._held[0] != name:
            self._held = None  # freed before the next one is made
            self._held = name, self._read(name).contiguous()
        values = self._held[1]
        assert values.dtype is view.dtype, (name, values.dtype, view.dtype)
        # a tensor that was read may lie anywhere in its file's storage
        return values.as_strided(view.shape, view.stride(), values.storage_offset() + view.storage_offset())


def _storage_of(tensor: Tensor) -> StorageWeakRef:
    """Equal, with equal hash, for tensors that share one storage."""
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]


class _Planner(EntryPlanner):
    """Asks for values when one is written."""

    def __init__(self, entries: Sequence[Entry], values: _Values) -> None:
        super().__init__(entries)
        self._values = values

    def values(self, entry: ShardedTensor) -> Tensor:
        return self._values.of(entry.data).view(stored_chunk(entry).sizes)


class _FilePerKey(FileSystemWriter):
    """Puts the chunks of each key into a file of its own, small objects into one together.

    torch keeps the last chunk of each key of a file until the file is done.
    """

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        by_key: dict[str | None, list[WriteItem]] = {}
        for item in plan.items:
            key = None if item.type is WriteItemType.BYTE_IO else item.index.fqn
            by_key.setdefault(key, []).append(item)
        results: list[WriteResult] = []
        for number, items in enumerate(by_key.values()):
            prefix = dataclasses.replace(plan.storage_data, prefix=f"{plan.storage_data.prefix}{number}_")
            part = dataclasses.replace(plan, items=items, storage_data=prefix)
            results += super().write_data(part, planner).wait()
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done
