"""Checksums of tensors' bits, made where they lie: equal bits give equal checksums, other bits practically never do."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_BLOCK = 1 << 22
"""Elements widened at a time."""
_FACTOR = 6364136223846793005


def fingerprint(tensor: Tensor) -> Tensor:
    """[2] int64 on the tensor's device: the sum of its bits, and one that tells their order."""
    flat = tensor.detach().contiguous().view(-1)
    bits = flat.view(_BITS[flat.element_size()])
    result = torch.zeros(2, dtype=torch.int64, device=tensor.device)
    for block in torch.split(bits, _BLOCK) if bits.numel() else ():
        wide = block.to(torch.int64)
        places = torch.arange(1, wide.numel() + 1, dtype=torch.int64, device=tensor.device)
        result[0] += wide.sum()
        result[1] = result[1] * _FACTOR + (wide * places).sum()
    return result


def fingerprints(tensors: Iterable[Tensor], device: torch.device) -> Tensor:
    """[N, 2] int64 of N tensors."""
    made = [fingerprint(tensor) for tensor in tensors]
    return torch.stack(made) if made else torch.zeros(0, 2, dtype=torch.int64, device=device)
