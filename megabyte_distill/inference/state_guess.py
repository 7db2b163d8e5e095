"""What the backbone will say of a chunk, guessed from the chunk and the state before: what drafts are written from.

The guess is linear and fitted by least squares to what the backbone did say, so it costs one small product and needs no
training. Whatever it is, the engine's output is the same; a good one makes drafts that are right.
"""

from __future__ import annotations

import torch
from torch import Tensor

_FIRST_FIT = 64
"""Chunks seen before the first fit; fits follow as their number grows by half."""
_ENOUGH = 50_000
"""Chunks after which nothing more is learned."""
_RIDGE = 1e-3
"""Of the mean square of the features."""


class StateGuess:
    """h_j ≈ A · chunk_j + B · h_{j−1} + c; the state before, as long as nothing was learned.

    Attributes:
        seen: chunks learned from.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        size = 2 * width + 1
        self._gram = torch.zeros(size, size, dtype=torch.float64, device=device)
        self._products = torch.zeros(size, width, dtype=torch.float64, device=device)
        self._weights: Tensor | None = None
        self._next_fit = _FIRST_FIT
        self.seen = 0

    def __call__(self, chunks: Tensor, before: Tensor) -> Tensor:
        """[N, E] states of chunks [N, E] behind states [N, E]."""
        return before if self._weights is None else _features(chunks, before) @ self._weights

    def learn(self, chunks: Tensor, before: Tensor, hidden: Tensor) -> None:
        """That the backbone gave ``hidden`` [N, E] for ``chunks`` [N, E] behind ``before`` [N, E]."""
        if self.seen >= _ENOUGH or not chunks.shape[0]:
            return
        features = _features(chunks, before).double()
        self._gram += features.T @ features
        self._products += features.T @ hidden.double()
        self.seen += chunks.shape[0]
        if self.seen >= self._next_fit:
            self._next_fit = self.seen * 3 // 2
            ridge = _RIDGE * self._gram.diagonal().mean()
            damped = self._gram + ridge * torch.eye(self._gram.shape[0], dtype=torch.float64, device=self._gram.device)
            self._weights = torch.linalg.solve(damped, self._products).float()


def _features(chunks: Tensor, before: Tensor) -> Tensor:
    one = torch.ones(chunks.shape[0], 1, dtype=torch.float32, device=chunks.device)
    return torch.cat((chunks.float(), before.float(), one), dim=1)


def following(row: Tensor, hidden: Tensor, before: Tensor) -> Tensor:
    """The state in front of each of N chunks, [N, E]: ``hidden`` [N, E] of the chunk before in the same row, and for a
    row's first chunk ``before`` [K, E] of its row. Chunks stand row by row, ``row`` [N] rises."""
    if not row.shape[0]:
        return hidden
    is_first = torch.cat((torch.ones_like(row[:1], dtype=torch.bool), row[1:] != row[:-1]))
    return torch.where(is_first[:, None], before[row].to(hidden.dtype), hidden.roll(1, 0))
