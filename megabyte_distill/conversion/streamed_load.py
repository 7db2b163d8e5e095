"""Parameters of a torch_dist checkpoint, read one at a time: a model need not fit memory.

The counterpart of streamed_save.py. megatron's own load wants all layers' parts of a stacked tensor at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor, nn
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megabyte_distill.training.checkpoint import (
    CheckpointError,
    check_shapes,
    readable,
    sharded_state_dict,
    verify_checkpoint,
)
from megabyte_distill.training.checkpoint_writer import stored_chunk


class StoredParameters:
    """The parameters of a complete checkpoint by the names they have in a module, whatever sizes it was saved at."""

    def __init__(
        self, checkpoint: Path, module: nn.Module, *, prefix: str = "", is_part: bool = False, verify: bool = True
    ) -> None:
        """``module``: gives names, shapes and dtypes; it may be on the meta device. Only parameters whose names start
        with ``prefix`` are there. CheckpointError names all of them that the checkpoint has not, or in another shape,
        and tensors with that prefix which the module has not, unless it ``is_part`` of what is stored.

        ``verify``: as in ``load_checkpoint``. Collective.
        """
        self._checkpoint = checkpoint
        self._entries: dict[str, ShardedTensor | ShardedTensorFactory] = {
            name: entry
            for name, entry in sharded_state_dict(module).items()
            if name.startswith(prefix) and isinstance(entry, ShardedTensor | ShardedTensorFactory)
        }
        verify_checkpoint(checkpoint, hashes=verify)
        check_shapes(self._parts(), checkpoint, padded=False)
        with readable(checkpoint):
            self._reader = FileSystemReader(checkpoint)
            metadata = self._reader.read_metadata()
            self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        self._stored: Mapping[str, Any] = metadata.state_dict_metadata
        wanted = {part.key for _, part in self._parts()}
        surplus = [
            key
            for key, stored in self._stored.items()
            if isinstance(stored, TensorStorageMetadata) and key.startswith(prefix) and key not in wanted
        ]
        if surplus and not is_part:
            raise CheckpointError(f"{checkpoint} does not fit the model, which has no {', '.join(surplus[:8])}")

    def read(self, name: str) -> Tensor:
        """One parameter in new memory; CheckpointError names it where the checkpoint is damaged."""
        entry = self._entries[name]
        entry = replace(entry, data=torch.empty_like(entry.data, device="cpu"))
        with readable(self._checkpoint, name):
            if isinstance(entry, ShardedTensor):
                self._fill(entry)
                parameter: Tensor = entry.data
                return parameter
            built = entry.build()
            for part in nested_values(built):
                self._fill(part)
            merged: Tensor = entry.merge_fn(_values_of(built))
            return merged

    def _parts(self) -> Iterator[tuple[str, ShardedTensor]]:
        for name, entry in self._entries.items():
            built = entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]
            yield from ((name, part) for part in nested_values(built))

    def _fill(self, part: ShardedTensor) -> None:
        stored = self._stored[part.key]
        assert isinstance(stored, TensorStorageMetadata), part.key
        chunk = stored_chunk(part)
        items = create_read_items_for_chunk_list(part.key, stored, [chunk])
        if sum(math.prod(item.lengths) for item in items) != math.prod(chunk.sizes):
            raise CheckpointError(f"the parts of {part.key} that are stored do not make the whole")
        self._reader.read_data(LoadPlan(items), _Into(part.data.view(chunk.sizes))).wait()


class _Into(DefaultLoadPlanner):
    """Has a reader put what it reads into one tensor."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self._target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        part = self._target
        for dimension, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            part = part.narrow(dimension, start, length)
        return part

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """The tensor is the target's own memory."""


def _values_of(built: Any) -> Any:
    """The structure that a factory built, with tensors in it instead of their descriptions."""
    if isinstance(built, ShardedTensor):
        return built.data
    if isinstance(built, dict):
        return {key: _values_of(value) for key, value in built.items()}
    return [_values_of(value) for value in built]
