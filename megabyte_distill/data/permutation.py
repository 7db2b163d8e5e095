"""A keyed bijection of range(n): an order of n documents that needs no index and no memory."""

from __future__ import annotations

import hashlib

_ROUNDS = 8
_MASK = (1 << 64) - 1


class Permutation:
    """``self[i]`` for i in range(n) takes every value of range(n) once; a function of n and ``key`` alone.

    A Feistel network over the next even number of bits, walked along its cycle until the value falls below n
    (fewer than four steps on average).
    """

    def __init__(self, size: int, key: tuple[int, ...]) -> None:
        """ValueError for a size below 1."""
        if size < 1:
            raise ValueError(f"cannot order {size} documents")
        self.size = size
        self._half = max(1, (max(1, (size - 1).bit_length()) + 1) // 2)
        digest = hashlib.blake2b(repr(tuple(int(part) for part in key)).encode(), digest_size=8 * _ROUNDS).digest()
        self._keys = [int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(_ROUNDS)]

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        if not 0 <= index < self.size:
            raise IndexError(f"{index} is outside range({self.size})")
        value = self._encrypt(index)
        while value >= self.size:
            value = self._encrypt(value)
        return value

    def _encrypt(self, value: int) -> int:
        half = self._half
        low_bits = (1 << half) - 1
        left, right = value >> half, value & low_bits
        for key in self._keys:
            # splitmix64's finaliser: every bit of (right, key) reaches every bit of the result
            mixed = ((right + 1) * 0x9E3779B97F4A7C15 ^ key) & _MASK
            mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
            mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK
            left, right = right, left ^ ((mixed ^ (mixed >> 31)) & low_bits)
        return left << half | right
