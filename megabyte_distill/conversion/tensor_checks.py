"""Checks of whole tensors that take constant memory: a piece at a time, however large the tensor is."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_PIECE_ELEMENTS = 1 << 20


def check_finite(tensor: Tensor, what: str) -> None:
    """ValueError "``what`` holds N NaN or infinite value(s)" where any element is not finite."""
    bad = sum(int((~torch.isfinite(piece)).sum()) for piece in _pieces(tensor))
    if bad:
        raise ValueError(f"{what} holds {bad} NaN or infinite value(s)")


def converted(tensor: Tensor, dtype: torch.dtype, what: str) -> Tensor:
    """The tensor in ``dtype``; ValueError that begins with ``what`` where a finite value becomes infinite in it."""
    result = tensor.to(dtype)
    if dtype is not tensor.dtype:
        bad = sum(int((~torch.isfinite(piece)).sum()) for piece in _pieces(result))
        if bad:
            name = str(dtype).removeprefix("torch.")
            raise ValueError(
                f"{what}: {bad} value(s) are beyond what {name} can hold; choose another dtype with --torch-dtype"
            )
    return result


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same shape, dtype and bytes."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return all(
        torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(_pieces(one), _pieces(other), strict=True)
    )


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    flat = tensor.contiguous().view(-1)
    return (flat[start : start + _PIECE_ELEMENTS] for start in range(0, flat.numel(), _PIECE_ELEMENTS))
