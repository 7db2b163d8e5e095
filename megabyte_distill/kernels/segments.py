"""Where the documents of a packed row begin and end: the masks that every sequence operator shares.

Built once per forward call and handed to all blocks, so that a stack of blocks derives its masks once.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


class Segments:
    """The segments of one packed row of P bytes.

    Attributes:
        cu_seqlens: [S+1] int32, first byte of each segment, then P.
        of_byte: [P] int64, the segment a byte belongs to.
        position: [P] int64, a byte's index inside its segment.
    """

    def __init__(self, cu_seqlens: Tensor, length: int) -> None:
        self.cu_seqlens = cu_seqlens
        self.length = length
        index_P = torch.arange(length, device=cu_seqlens.device)
        offsets = cu_seqlens.to(torch.int64)
        self.of_byte = torch.searchsorted(offsets[1:].contiguous(), index_P, right=True)
        self.position = index_P - offsets[self.of_byte]
        self._bounds: list[tuple[int, int]] | None = None
        self._reach: dict[int, Tensor] = {}
        self._blocks: dict[int, ScanBlocks] = {}
        self._made: dict[Hashable, Any] = {}

    @property
    def count(self) -> int:
        """Number of segments, S."""
        return int(self.cu_seqlens.shape[0]) - 1

    @property
    def bounds(self) -> list[tuple[int, int]]:
        """(first byte, one past the last) of each segment as Python ints: one copy to the host per row."""
        if self._bounds is None:
            edges = self.cu_seqlens.tolist()
            self._bounds = list(pairwise(edges))
        return self._bounds

    @property
    def lengths(self) -> list[int]:
        """Bytes of each segment as Python ints; the same copy to the host."""
        return [last - first for first, last in self.bounds]

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What ``make`` gives, made at the first call with this key and handed to all blocks behind it."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def reach(self, offset: int) -> Tensor:
        """[P] bool: the byte ``offset`` places earlier is in the same segment."""
        if offset not in self._reach:
            self._reach[offset] = self.position >= offset
        return self._reach[offset]

    def scan_blocks(self, size: int) -> ScanBlocks:
        """The masks of a scan that walks the row in blocks of ``size`` bytes."""
        if size not in self._blocks:
            self._blocks[size] = ScanBlocks(self, size)
        return self._blocks[size]


class ScanBlocks:
    """Which bytes of a block of Q bytes see each other, the block before, and the block's end; C = ceil(P / Q) blocks.

    Attributes:
        hidden: [C, Q, Q] bool, True where byte l must not see byte s (s later, or in another segment).
        carried: [C, Q] bool, byte l belongs to the segment that was open when the block began.
        to_end: [C, Q] bool, byte s belongs to the segment that is open when the block ends.
    """

    def __init__(self, segments: Segments, size: int) -> None:
        padding = -segments.length % size
        # The row's padding repeats the last segment: padded inputs are zero, so nothing comes from there.
        last = int(segments.count) - 1
        of_byte = torch.nn.functional.pad(segments.of_byte, (0, padding), value=last).view(-1, size)
        later = torch.ones(size, size, dtype=torch.bool, device=of_byte.device).triu(1)
        self.hidden = (of_byte[:, :, None] != of_byte[:, None, :]) | later
        before = torch.nn.functional.pad(of_byte[:-1, -1], (1, 0), value=-1)
        self.carried = of_byte == before[:, None]
        self.to_end = of_byte == of_byte[:, -1:]
