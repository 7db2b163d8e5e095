"""How many bytes of tensors a piece of work brings into being, and how many of them are alive at once."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While active, watches every storage that an operation makes; what was there before does not count.

    Works on any device, meta included: there the sizes are real and the memory is not.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        """Bytes alive that were made while this was active."""
        self.peak = 0
        """The most there were at the end of an operation."""
        self._born: dict[int, weakref.ref[UntypedStorage]] = {}
        self._older: dict[int, UntypedStorage] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for storage in _storages((args, kwargs)):
            if storage._cdata not in self._born:
                self._older[storage._cdata] = storage  # kept, so that nobody else gets its address
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            if storage._cdata not in self._older and storage._cdata not in self._born:
                self._watch(storage, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def _watch(self, storage: UntypedStorage, size: int) -> None:
        key = storage._cdata

        def forget(_: Any) -> None:
            del self._born[key]
            self.now -= size

        self._born[key] = weakref.ref(storage, forget)
        self.now += size


def _storages(values: Any) -> list[UntypedStorage]:
    return [value.untyped_storage() for value in tree_iter(values) if isinstance(value, Tensor)]
