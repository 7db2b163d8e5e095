"""What every fused operator asks of its tensors before a kernel reads them."""

from __future__ import annotations

import torch
from torch import Tensor

from megabyte_distill.kernels.library import DTYPE_CODES

VECTOR = 8
"""Numbers a thread handles at once (kVec): widths are multiples of it."""
MAX_WIDTH = 8192
"""Widest row that one block holds (kMaxWidth)."""
WIDTHS = f"widths that are a multiple of {VECTOR} up to {MAX_WIDTH}"


def width_refusal(width: int) -> str | None:
    """Why rows of this width cannot be run, or None."""
    if width % VECTOR == 0 and VECTOR <= width <= MAX_WIDTH:
        return None
    return f"got a width of {width}, expected a multiple of {VECTOR} up to {MAX_WIDTH}"


VECTORS = f"widths that are a multiple of {VECTOR}"


def vector_refusal(width: int) -> str | None:
    """Why rows of this width cannot be read in vectors, or None."""
    return None if width % VECTOR == 0 and width else f"got a width of {width}, expected a multiple of {VECTOR}"


def dtype_refusal(*tensors: Tensor | None) -> str | None:
    """Why tensors of these dtypes cannot be run together, or None; absent ones do not count."""
    found = {tensor.dtype for tensor in tensors if tensor is not None}
    if len(found) == 1 and found <= DTYPE_CODES.keys():
        return None
    names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in found))
    return f"got {names}, expected float32 or bfloat16, the same for all"


def form_refusal(
    name: str, tensor: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype | None = None
) -> str | None:
    """Why a tensor has not this shape (and dtype), or None; an absent one does not count.

    A kernel knows addresses alone: it would read behind the end of what torch refuses or broadcasts.
    """
    if tensor is None or (tensor.shape == shape and (dtype is None or tensor.dtype is dtype)):
        return None
    got, wanted = (str(one).removeprefix("torch.") for one in (tensor.dtype, dtype or tensor.dtype))
    return f"got {name} of {got} {list(tensor.shape)}, expected {wanted} {list(shape)}"


def dtype_code(tensor: Tensor) -> int:
    """The C ABI's name of a tensor's dtype."""
    return DTYPE_CODES[tensor.dtype]


def scratch(like: Tensor, *shape: int) -> Tensor:
    """Uninitialised fp32 memory on the device of ``like``."""
    return torch.empty(shape, device=like.device, dtype=torch.float32)


def absent(like: Tensor) -> Tensor:
    """Stands in the place of an output that nobody asked for: no numbers, in the dtype of ``like``."""
    return like.new_empty(0)
