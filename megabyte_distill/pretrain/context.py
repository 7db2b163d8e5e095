"""Documents that are longer than the teacher was made for."""

from __future__ import annotations

from collections.abc import Sequence

from megabyte_distill.data.dataset import ByteTokenDataset

_DOCUMENTS = 1000
"""Of each set that are looked at."""


def beyond_context(datasets: Sequence[ByteTokenDataset], row_bytes: int, positions: int) -> str | None:
    """What to tell a user whose rows hold more of a document than a backbone of so many ``positions`` was made for.

    Judged by documents all over each set; None where those fit.
    """
    longest, row = 0, 0
    for dataset in datasets:
        for document in range(0, len(dataset), max(1, len(dataset) // _DOCUMENTS)):
            tokens, size = dataset.num_tokens(document), dataset.num_bytes(document)
            held = tokens if size <= row_bytes else round(tokens * row_bytes / size)
            if held > longest:
                longest, row = held, min(size, row_bytes)
    if longest < positions:  # the document's start has a position of its own
        return None
    fits = (positions - 1) * row // longest
    return (
        f"rows of {row_bytes:,} bytes hold documents of {longest:,} tokens, and the teacher was made for "
        f"{positions:,} positions (its max_position_embeddings): what it says behind them is not what it learned. "
        f"A --seq-length of {fits:,} cuts these documents to what fits"
    )
