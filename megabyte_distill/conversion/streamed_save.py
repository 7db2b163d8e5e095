"""megatron's torch_dist format, written from parameters that are made one after the other.

megatron decides what is written: a backbone without memory (:func:`backbone_skeleton`) tells names, global shapes and
offsets. Its tensors are told apart by their storage, and a part that megatron cut out of one is found by its strides,
so that the values can take its place at the moment they are written.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch import Tensor
from torch.distributed.checkpoint import state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future
from torch.multiprocessing.reductions import StorageWeakRef

from megabyte_distill.config.model import BackboneConfig
from megabyte_distill.conversion.streamed_load import stored_chunk
from megabyte_distill.model.backbone import Backbone, transformer_config


def backbone_skeleton(config: BackboneConfig, dtype: torch.dtype) -> Backbone:
    """A backbone whose parameters have names, shapes and ``dtype`` but no memory. Needs process groups, sizes 1."""
    with torch.device("meta"):
        backbone: Backbone = Backbone(config, transformer_config(config, perform_initialization=False)).to(dtype)
    return backbone


class StreamedSave(TorchDistSaveShardedStrategy):  # type: ignore[misc]
    """A writer for ``training.checkpoint.save_checkpoint`` of a module without memory; of one process.

    The folder has the keys, shapes, chunks and small files of megatron's own save; only the number of .distcp files
    differs, one for each key. Memory stays within a few times the largest parameter.
    """

    def __init__(self, parameters: Mapping[str, Tensor], read: Callable[[str], Tensor]) -> None:
        """``parameters``: on the meta device, by name; ``read``: gives one of them with its values, same shape and
        dtype. It is called once for each name; what it raises ends the save.
        """
        super().__init__("torch_dist", 1)
        self._parameters, self._read = parameters, read

    def save(self, sharded_state_dict: Mapping[str, Any], checkpoint_dir: str | Path) -> None:
        """megatron calls it with everything that is to be written."""
        planner = _Planner(list(nested_values(sharded_state_dict)), _Values(self._parameters, self._read))
        writer = _FilePerKey(checkpoint_dir, per_thread_copy_ahead=0)
        try:
            state_dict_saver.save({}, storage_writer=writer, planner=planner)
        except CheckpointException as error:  # torch's wrapper of what the ranks raised; this is the only one
            [(original, _)] = error.failures.values()
            raise original from None


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


class _Planner(DefaultSavePlanner):
    """Plans megatron's sharded tensors and objects as they are; asks for values when one is written."""

    def __init__(self, entries: list[ShardedTensor | ShardedObject], values: _Values) -> None:
        super().__init__(flatten_state_dict=False)
        self._values = values
        self._entries = {_index(entry): entry for entry in entries if is_main_replica(entry.replica_id)}

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([_write_item(index, entry) for index, entry in self._entries.items()])
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        entry = self._entries[dataclasses.replace(write_item.index, index=None)]
        if isinstance(entry, ShardedObject):
            content = io.BytesIO()
            torch.save([entry.data], content)
            return content
        return self._values.of(entry.data).view(stored_chunk(entry).sizes)


def _index(entry: ShardedTensor | ShardedObject) -> MetadataIndex:
    if isinstance(entry, ShardedObject):
        return MetadataIndex(entry.unique_key)
    return MetadataIndex(entry.key, torch.Size(entry.global_offset))


def _write_item(index: MetadataIndex, entry: ShardedTensor | ShardedObject) -> WriteItem:
    if isinstance(entry, ShardedObject):
        return WriteItem(index=index, type=WriteItemType.BYTE_IO)
    data = TensorWriteData(
        chunk=stored_chunk(entry), properties=TensorProperties(dtype=entry.dtype), size=torch.Size(entry.global_shape)
    )
    return WriteItem(index=index, type=WriteItemType.SHARD, tensor_data=data)


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
            try:
                results += super().write_data(part, planner).wait()
            except RuntimeError as error:  # torch's, about its own format, once the file could not be written
                raise error.__context__ if isinstance(error.__context__, OSError) else error from None
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done
