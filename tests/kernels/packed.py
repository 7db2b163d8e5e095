"""Packed rows of the shapes that break kernels: no bytes, one, documents of one byte, long ones."""

from __future__ import annotations

import torch
from torch import Tensor

ROWS: dict[str, tuple[int, ...]] = {
    "none": (),
    "one": (1,),
    "single": (63,),
    "ones": (1, 1, 1, 1, 1),
    "ragged": (1, 5, 1, 63, 200, 2, 128),
    "long": (1000,),
}
"""Lengths of the documents of a row."""


def offsets(lengths: tuple[int, ...]) -> Tensor:
    """cu_seqlens [S+1] int32."""
    return torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0).to(torch.int32)


def some_bits(cu_seqlens: Tensor, density: float, *, closed: bool = True) -> Tensor:
    """Random bits [P]; ``closed``: each document's first and last byte are ends."""
    bits = torch.rand(int(cu_seqlens[-1])) < density
    if closed:
        bits[cu_seqlens[:-1].long()] = True
        bits[cu_seqlens[1:].long() - 1] = True
    return bits
