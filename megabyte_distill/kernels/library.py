"""A built kernel library: loaded with ctypes, called with tensors, and asked what it is."""

from __future__ import annotations

import contextlib
import ctypes
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from megabyte_distill.kernels import build

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1}
"""What the kernels compute on, and how the C ABI names it."""
ALIGNMENT = 16
"""Bytes of one vector access."""
calls: Counter[str] = Counter()
"""How often each kernel entry was called in this process, for tests."""

Argument = Tensor | int | float | bool | None


class Library:
    """One shared library of kernels, for CUDA or for the CPU."""

    def __init__(self, path: Path) -> None:
        """Load ``path``; OSError where it cannot be loaded."""
        self.path = path
        self._library = ctypes.CDLL(str(path))
        for name in ("mbk_last_error", "mbk_targets"):
            getattr(self._library, name).restype = ctypes.c_char_p
        self.targets: tuple[str, ...] = tuple(self._library.mbk_targets().decode().split())
        """GPU architectures, or ("cpu",)."""

    def call(self, name: str, *arguments: Argument) -> None:
        """Call ``mbk_<name>`` on the current stream of the tensors' device. Tensors become pointers, None a null one.

        Raises:
            RuntimeError: what the library says went wrong.
        """
        calls[name] += 1
        device = next(value.device for value in arguments if isinstance(value, Tensor))
        converted = [_converted(value, device) for value in arguments]
        on_gpu = device.type == "cuda"
        with torch.cuda.device(device) if on_gpu else contextlib.nullcontext():
            stream = torch.cuda.current_stream(device).cuda_stream if on_gpu else None
            code = getattr(self._library, f"mbk_{name}")(*converted, ctypes.c_void_p(stream))
        if code:
            raise RuntimeError(f"kernel {name} failed ({code}): {self._library.mbk_last_error().decode()}")

    @contextlib.contextmanager
    def order(self, order: int) -> Iterator[None]:
        """Run lanes, warps and blocks of the CPU library in another order: 1 reversed, from 2 up a shuffle's seed."""
        self._library.mbk_set_order(ctypes.c_int64(order), None)
        try:
            yield
        finally:
            self._library.mbk_set_order(ctypes.c_int64(0), None)


def _converted(value: Argument, device: torch.device) -> ctypes.c_void_p | ctypes.c_int64 | ctypes.c_double:
    if value is None:
        return ctypes.c_void_p(None)
    if isinstance(value, Tensor):
        assert value.is_contiguous() and value.device == device, "kernels take contiguous tensors of one device"
        assert value.data_ptr() % ALIGNMENT == 0, "kernels take aligned tensors: pass them through prepared()"
        return ctypes.c_void_p(value.data_ptr())
    return ctypes.c_double(value) if isinstance(value, float) else ctypes.c_int64(int(value))


def prepared(tensor: Tensor) -> Tensor:
    """The tensor itself where a kernel can read it, else a contiguous, aligned copy."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()


_loaded: dict[str, Library] = {}


def load(kind: str, path: Path | None = None) -> Library:
    """Make the library for ``cuda`` or ``cpu`` the one that :func:`library_for` finds.

    Raises:
        ValueError: where there is none for these sources, or it cannot be loaded; says how to build it.
    """
    path = path or build.library_path(kind)
    remedy = f"build it with: python -m megabyte_distill.kernels build {kind}"
    if not path.exists():
        raise ValueError(f"there is no kernel library {path.name} in {path.parent}; {remedy}")
    try:
        library = Library(path)
    except (OSError, AttributeError) as error:
        raise ValueError(f"the kernel library {path} cannot be loaded ({error}); {remedy}") from error
    _loaded[kind] = library
    return library


def library_for(tensor: Tensor) -> Library:
    """The loaded library for a tensor's device; :func:`load` comes first."""
    return _loaded[tensor.device.type]
