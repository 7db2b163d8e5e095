"""The engine's step on a CPU (cpu_step/), loaded with ctypes: how a model is described to it, and its calls."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from megabyte_distill.kernels import build

_POINTER, _WHOLE = ctypes.c_void_p, ctypes.c_int64
_ARGUMENTS = {
    "free": (_POINTER,),
    "encode": (_POINTER, _WHOLE, _WHOLE, _POINTER, _POINTER, _POINTER, _WHOLE),
    "decode": (_POINTER, _WHOLE, _WHOLE, _POINTER, _POINTER, _POINTER, _POINTER, _POINTER, _WHOLE),
    "backbone": (_POINTER, _WHOLE, _POINTER, _POINTER, _POINTER, _POINTER, _WHOLE),
    "reset": (_POINTER, _WHOLE, _POINTER),
    "copy": (_POINTER, _WHOLE, _POINTER, _WHOLE),
    "keep": (_POINTER, _WHOLE, _WHOLE, _POINTER, _POINTER),
}
_loaded: dict[Path, ctypes.CDLL] = {}


def load(path: Path | None = None) -> ctypes.CDLL:
    """The library of these sources for this machine.

    Raises:
        ValueError: where it was not built or cannot be loaded; says what to do.
    """
    path = path or build.step_library_path()
    if path in _loaded:
        return _loaded[path]
    remedy = "build it with: python -m megabyte_distill.kernels build step"
    if not path.exists():
        raise ValueError(f"there is no {path.name} in {path.parent}; {remedy}")
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise ValueError(f"the library {path} cannot be loaded ({error}); {remedy}") from error
    library.mbs_new.restype, library.mbs_new.argtypes = _POINTER, (_POINTER, _POINTER)
    for name, arguments in _ARGUMENTS.items():
        function = getattr(library, f"mbs_{name}")
        function.restype, function.argtypes = None, arguments
    _loaded[path] = library
    return library


class Description:
    """What ``Reader`` in cpu_step/description.h reads: whole numbers and addresses in order, real numbers in order.

    Attributes:
        kept: every tensor whose address was given; they must outlive the model.
    """

    def __init__(self) -> None:
        self.whole: list[int] = []
        self.real: list[float] = []
        self.kept: list[Tensor] = []

    def number(self, *values: int) -> None:
        """Whole numbers."""
        self.whole.extend(values)

    def list(self, values: Sequence[int]) -> None:
        """Their number, then they."""
        self.number(len(values), *values)

    def fraction(self, value: float) -> None:
        """A real number."""
        self.real.append(value)

    def pointer(self, tensor: Tensor | None) -> None:
        """The address of contiguous fp32 numbers on the CPU, or none."""
        if tensor is None:
            self.number(0)
            return
        tensor = tensor.detach()
        assert tensor.dtype is torch.float32 and tensor.device.type == "cpu", "the CPU step computes in fp32"
        tensor = tensor.contiguous()
        self.kept.append(tensor)
        self.number(tensor.data_ptr())

    def dense(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """A matrix [out, in] and its bias."""
        self.pointer(weight)
        self.pointer(bias)
        self.number(weight.shape[1], weight.shape[0])

    def norm(self, weight: Tensor, eps: float) -> None:
        """An RMSNorm."""
        self.pointer(weight)
        self.fraction(eps)
        self.number(weight.numel())


class StepModel:
    """A model in the library; the methods are the library's calls, one after the other, not side by side."""

    def __init__(self, description: Description) -> None:
        """ValueError as :func:`load`."""
        self._library, self._kept = load(), description.kept
        whole = torch.tensor(description.whole, dtype=torch.int64)
        real = torch.tensor(description.real, dtype=torch.float64)
        self._model = self._library.mbs_new(whole.data_ptr(), real.data_ptr())

    def __del__(self) -> None:
        if hasattr(self, "_model"):
            self._library.mbs_free(self._model)

    def encode(self, byte_ids: Tensor, slots: Tensor, width: int) -> Tensor:
        """r [K, T, E] of the next bytes [K, T] int64 of slots [K] int64, which move on by them."""
        byte_ids, (rows, length) = byte_ids.contiguous(), byte_ids.shape
        r = torch.empty(rows, length, width)
        self._library.mbs_encode(
            self._model, rows, length, slots.data_ptr(), byte_ids.data_ptr(), r.data_ptr(), torch.get_num_threads()
        )
        return r

    def decode(self, byte_ids: Tensor, slots: Tensor, s: Tensor, r: Tensor, classes: int) -> Tensor:
        """Logits [K, T, classes] behind the same bytes, given what they read of their chunks, s [K, T, E], and r."""
        byte_ids, (rows, length) = byte_ids.contiguous(), byte_ids.shape
        logits, s = torch.empty(rows, length, classes), s.contiguous()
        self._library.mbs_decode(
            self._model, rows, length, slots.data_ptr(), byte_ids.data_ptr(), s.data_ptr(), r.data_ptr(),
            logits.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return logits

    def backbone(self, x: Tensor, slots: Tensor, places: Tensor) -> Tensor:
        """States [N, E] of x [N, E] at ``places`` [N] int64 of ``slots`` [N], behind what those hold."""
        x, out = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
        self._library.mbs_backbone(
            self._model, x.shape[0], slots.data_ptr(), places.data_ptr(), x.data_ptr(), out.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
        return out

    def reset(self, slots: Tensor) -> None:
        """Slots [K] begin a document."""
        self._library.mbs_reset(self._model, slots.shape[0], slots.data_ptr())

    def save(self, slots: Tensor) -> None:
        """Remember where slots [K] stand."""
        self._library.mbs_copy(self._model, slots.shape[0], slots.data_ptr(), 0)

    def restore(self, slots: Tensor) -> None:
        """Take slots [K] back to where they were saved."""
        self._library.mbs_copy(self._model, slots.shape[0], slots.data_ptr(), 1)

    def keep(self, slots: Tensor, length: int, counts: Tensor) -> None:
        """Of the T = ``length`` bytes that slots [K], saved before, last read, each keeps ``counts`` [K] int64."""
        self._library.mbs_keep(self._model, slots.shape[0], length, slots.data_ptr(), counts.data_ptr())
