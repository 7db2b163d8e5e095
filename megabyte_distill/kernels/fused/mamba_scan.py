"""Mamba-2's scan through the kernels of the package mamba_ssm, where a user has it.

Same mathematics as ``kernels.ssm_scan``; products run on tensor cores in the inputs' dtype and the [Q, Q] weights of a
block never reach memory. The result has x's dtype. Its backward adds atomically unless MAMBA_DETERMINISTIC=1.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from megabyte_distill import optional
from megabyte_distill.kernels.dispatch import FusedOp
from megabyte_distill.kernels.segments import Segments

_MODULE = "mamba_ssm.ops.triton.ssd_combined"
_SMALLEST_BLOCK, _LARGEST_BLOCK = 64, 256


def _kernels() -> Any:
    return optional.usable(_MODULE)


def is_usable() -> bool:
    """Whether mamba_ssm's scan can be imported here."""
    return _kernels() is not None


def block_size(block: int) -> int:
    """The power of two, 64 to 256, nearest below the block asked for: what the kernels take."""
    return max(_SMALLEST_BLOCK, min(_LARGEST_BLOCK, 1 << (max(block, 1).bit_length() - 1)))


def mamba_scan(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, segments: Segments, block: int) -> Tensor:
    """As ``kernels.ssm_scan.ssm_scan``, in x's dtype."""
    y: Tensor = _kernels().mamba_chunk_scan_combined(
        x[None],
        dt[None],
        a,
        b.to(x.dtype)[None, :, None],
        c.to(x.dtype)[None, :, None],
        block_size(block),
        seq_idx=segments.of_byte.int()[None],
    )
    return y[0]


def _refusal(x: Tensor) -> str | None:
    if x.shape[0] == 0:
        return "got no bytes, expected some"
    if x.shape[2] & (x.shape[2] - 1):
        return f"got a head of {x.shape[2]}, expected a power of two"
    return None


FUSED = FusedOp(run=mamba_scan, refusal=_refusal, limits="heads of a power of two", is_ours=False)
