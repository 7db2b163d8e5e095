"""Writes a rank's tensors into torch_dist files, at once or in a thread beside the training.

megatron's own writer forks processes. A thread ends with its process, needs no queue between processes, and cannot
inherit a lock that another thread held at the fork; writing and hashing let go of the interpreter anyway.
"""

from __future__ import annotations

import dataclasses
import io
import math
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from megabyte_distill.training.manifest import FileRecord, balanced, records_of

Entry: TypeAlias = ShardedTensor | ShardedObject


def stored_chunk(tensor: ShardedTensor) -> ChunkStorageMetadata:
    """Where this process's part lies in the tensor that a checkpoint keeps; axes that megatron prepends are counted."""
    sizes = (1,) * tensor.prepend_axis_num + tuple(tensor.local_shape)
    return ChunkStorageMetadata(offsets=torch.Size(tensor.global_offset), sizes=torch.Size(sizes))


class Written(NamedTuple):
    """What a rank has written; the main rank makes the checkpoint's metadata of all of them."""

    plan: SavePlan
    results: list[WriteResult]
    records: dict[str, FileRecord]
    """Size and hash of each file."""


class EntryPlanner(DefaultSavePlanner):
    """Plans what this rank is to write of a sharded state, and hands out the values when they are written."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        super().__init__(flatten_state_dict=False)
        self.entries = {_index(entry): entry for entry in entries if is_main_replica(entry.replica_id)}

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([_write_item(index, entry) for index, entry in self.entries.items()])
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        entry = self.entries[dataclasses.replace(write_item.index, index=None)]
        return _bytes_of(entry) if isinstance(entry, ShardedObject) else self.values(entry)

    def values(self, entry: ShardedTensor) -> Tensor:
        """A part's values in the shape in which they are kept."""
        return entry.data.detach().view(stored_chunk(entry).sizes)  # type: ignore[no-any-return]


class _StagedPlanner(EntryPlanner):
    """Keeps a copy in host memory of everything as it is now."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        super().__init__(entries)
        resolve = super().resolve_data
        items = super().create_local_plan().items
        self._staged = {item.index: _host_copy(resolve(item)) for item in items}

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        return self._staged[dataclasses.replace(write_item.index, index=None)]


class CheckpointWriter(TorchDistSaveShardedStrategy):  # type: ignore[misc]
    """For ``sharded_strategy`` of megatron's save; one object writes one checkpoint.

    megatron calls :meth:`save`, which plans and writes, or with ``background`` copies to host memory and starts a
    thread. :meth:`wait` gives what was written; the main rank then calls :meth:`complete`. Errors of the writing are
    raised by :meth:`wait` only, so that no rank leaves megatron's collective calls early.
    """

    parts = 2
    """Shares of a rank that are written side by side, each by a thread of its own."""

    def __init__(self, *, background: bool = False) -> None:
        super().__init__("torch_dist", 1)
        self._background = background
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._written: Written | None = None
        self._folder = Path()

    def planner(self, entries: Sequence[Entry]) -> EntryPlanner:
        """Plans this rank's part and gives its values."""
        return _StagedPlanner(entries) if self._background else EntryPlanner(entries)

    def storage(self, folder: Path) -> FileSystemWriter:
        """Writes planned items into files."""
        # copying ahead would use the current device of the thread, which is not this rank's
        return FileSystemWriter(folder, per_thread_copy_ahead=0)

    def save(self, sharded_state_dict: Mapping[str, Any], checkpoint_dir: str | Path) -> None:
        """Called by megatron with everything that is to be written."""
        self._folder = Path(checkpoint_dir)
        try:
            planner, storage = self.planner(list(nested_values(sharded_state_dict))), self.storage(self._folder)
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # other threads read what this one has computed and copied
            arguments = (planner, storage, dist.get_rank())
            if self._background:
                self._thread = threading.Thread(target=self._write, args=arguments, name="checkpoint", daemon=True)
                self._thread.start()
            else:
                self._write(*arguments)
        except Exception as error:  # raised by wait()
            self._error = error

    def _write(self, planner: EntryPlanner, storage: FileSystemWriter, rank: int) -> None:
        try:
            planner.set_up_planner({}, is_coordinator=False)
            storage.set_up_storage_writer(False)
            plan = storage.prepare_local_plan(planner.create_local_plan())
            # torch numbers files by the place of a rank's plan in this list
            plan = storage.prepare_global_plan([SavePlan([])] * rank + [plan])[rank]
            shares = [share for share in _shares(plan, self.parts) if share.items]
            with ThreadPoolExecutor(self.parts) as pool:
                parts = list(pool.map(lambda share: storage.write_data(share, planner).wait(), shares))
            results = [result for part in parts for result in part]
            names = sorted({result.storage_data.relative_path for result in results})
            self._written = Written(plan, results, records_of(self._folder / name for name in names))
        except Exception as error:
            self._error = _cause(error)

    def is_done(self) -> bool:
        """Whether this rank's files are written (or could not be)."""
        return self._thread is None or not self._thread.is_alive()

    def wait(self) -> Written:
        """What this rank has written, once it has; raises what went wrong."""
        if self._thread is not None:
            self._thread.join()
        if self._error is not None:
            raise self._error
        assert self._written is not None, "megatron did not call save"
        return self._written

    def complete(self, ranks: Sequence[Written]) -> dict[str, FileRecord]:
        """Write .metadata from what all ranks have written; size and hash of all their files. For the main rank."""
        planner, storage = DefaultSavePlanner(flatten_state_dict=False), self.storage(self._folder)
        planner.set_up_planner({}, is_coordinator=True)
        _, metadata = planner.create_global_plan([rank.plan for rank in ranks])
        storage.set_up_storage_writer(True)
        storage.finish(metadata, [rank.results for rank in ranks])
        return {name: record for rank in ranks for name, record in rank.records.items()}


def _shares(plan: SavePlan, parts: int) -> list[SavePlan]:
    """A rank's plan in parts of about equal size, each with its own prefix of file names."""
    sizes = {place: _size(item) for place, item in enumerate(plan.items)}
    prefix = plan.storage_data.prefix
    return [
        dataclasses.replace(
            plan,
            items=[plan.items[place] for place in sorted(places)],
            storage_data=dataclasses.replace(plan.storage_data, prefix=f"{prefix}{number}_"),
        )
        for number, places in enumerate(balanced(sizes, parts))
    ]


def _size(item: WriteItem) -> int:
    """Bytes of a tensor; small objects count as nothing."""
    data = item.tensor_data
    return 0 if data is None else math.prod(data.chunk.sizes) * data.properties.dtype.itemsize


def _cause(error: Exception) -> BaseException:
    """A full disk, where torch complains about its own format, which it could not finish."""
    context = error.__context__
    return context if isinstance(error, RuntimeError) and isinstance(context, OSError) else error


def _index(entry: Entry) -> MetadataIndex:
    if isinstance(entry, ShardedObject):
        return MetadataIndex(entry.unique_key)
    return MetadataIndex(entry.key, torch.Size(entry.global_offset))


def _write_item(index: MetadataIndex, entry: Entry) -> WriteItem:
    if isinstance(entry, ShardedObject):
        return WriteItem(index=index, type=WriteItemType.BYTE_IO)
    data = TensorWriteData(
        chunk=stored_chunk(entry), properties=TensorProperties(dtype=entry.dtype), size=torch.Size(entry.global_shape)
    )
    return WriteItem(index=index, type=WriteItemType.SHARD, tensor_data=data)


def _bytes_of(entry: ShardedObject) -> io.BytesIO:
    content = io.BytesIO()
    torch.save([entry.data], content)
    return content


def _host_copy(value: Tensor | io.BytesIO) -> Tensor | io.BytesIO:
    return value.to("cpu", non_blocking=True, copy=True) if isinstance(value, Tensor) else value
