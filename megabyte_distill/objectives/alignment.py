"""Stage 1a's losses: the encoder's states at gold ends against the teacher's embeddings, as such and behind layers."""

from __future__ import annotations

import torch
from torch import Tensor

from megabyte_distill.parallel.vocabulary import VocabularyColumns


def alignment_squared_error(r: Tensor, target: Tensor) -> Tensor:
    """Mean over E of the squared difference, fp32 [N]; r and target [N, E]."""
    return (r.float() - target.float()).square().mean(-1)


@torch.no_grad()
def mean_square(states: Tensor) -> Tensor:
    """Mean over E of the squares, fp32 [N], of states [N, E], not below 1e-8.

    A pre-norm layer reads a state divided by its square root: an error over it is in the units of what layers read.
    """
    return states.float().square().mean(-1).clamp_(min=1e-8)


@torch.no_grad()
def mean_row(table: Tensor, columns: VocabularyColumns) -> Tensor:
    """The mean [E] fp32 over the whole embedding table, of this rank's rows of it."""
    rows = columns.total(torch.tensor(float(table.shape[0]), device=table.device))
    return columns.total(table.float().sum(0)) / rows


@torch.no_grad()
def table_variance(table: Tensor, columns: VocabularyColumns | None = None) -> Tensor:
    """Variance of an embedding table [W, E] around its mean row, averaged over E; fp32 scalar.

    The error of a constant guess: an alignment error over it is the share of the table that is not yet explained.
    With ``columns``, the table is this rank's rows alone.
    """
    if columns is None or columns.group is None:
        return table.float().var(dim=0, unbiased=False).mean()
    return mean_row((table.float() - mean_row(table, columns)).square(), columns).mean()
