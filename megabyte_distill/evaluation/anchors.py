"""What models score that know nothing of the context: a ratio of two figures means little without them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megabyte_distill.data.dataset import ByteTokenDataset
from megabyte_distill.data.packing import PackedRow
from megabyte_distill.data.token_bytes import TokenBytes
from megabyte_distill.inference.scoring import RowScore, score_tokens, token_row_score
from megabyte_distill.model.backbone import Backbone
from megabyte_distill.objectives.alignment import mean_row


def token_counts(datasets: Sequence[ByteTokenDataset]) -> NDArray[np.int64]:
    """[W] how often each token stands in the documents of the data sets."""
    size = datasets[0].table.vocab_size
    counts = np.zeros(size, dtype=np.int64)
    for dataset in datasets:
        for document in dataset.documents:
            counts += np.bincount(dataset.tokens(document, 0, dataset.num_tokens(document)), minlength=size)
    return counts


def unigram_nll(counts: NDArray[np.int64], table: TokenBytes) -> Tensor:
    """−log P(token) [W] in nats, fp32, with one added to the count of each token that stands for text; others: +inf.

    ``counts`` [W'] may lack the padding ids behind the tokenizer's own.
    """
    padded = np.zeros(table.vocab_size)
    padded[: counts.size] = counts[: table.vocab_size]
    weight = np.where(table.special, 0.0, padded + 1.0)
    with np.errstate(divide="ignore"):
        return torch.from_numpy(-np.log(weight / weight.sum())).float()


def score_unigram(nll_of_token: Tensor, row: PackedRow) -> RowScore:
    """Tokens by their frequency alone, from :func:`unigram_nll`."""
    return token_row_score(nll_of_token[row.token_labels], row)


def score_constant_embedding(teacher: Backbone, row: PackedRow) -> RowScore:
    """The teacher with every embedding replaced by the mean of its table: it knows positions and nothing else."""
    with torch.no_grad():
        table = teacher.embedding_table
        mean = mean_row(table, teacher.columns)
        return score_tokens(teacher, row, mean.to(table.dtype).expand(row.tokens.shape[0], -1))
