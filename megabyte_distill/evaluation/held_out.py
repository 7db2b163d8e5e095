"""The rows on which a run is judged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from megabyte_distill.config.ranges import COUNT
from megabyte_distill.data.dataset import ByteTokenDataset
from megabyte_distill.data.packing import PackedRow
from megabyte_distill.data.sampler import evaluation_rows
from megabyte_distill.data.text_mask import text_positions

OPENING_BYTES = 1024
"""Text of one opening."""


def held_out_rows(
    datasets: Sequence[ByteTokenDataset],
    *,
    row_bytes: int,
    chunk_bucket: int = 64,
    max_bytes: int | None = None,
    max_documents: int | None = None,
) -> list[PackedRow]:
    """Rows through the data sets in order, nothing left out but what the limits cut off.

    ``max_bytes`` stops behind the row that reaches it; ``max_documents`` counts in each data set. ValueError for limits
    below 1 and where there is not a byte of text.
    """
    for name, limit in (("max_bytes", max_bytes), ("max_documents", max_documents)):
        if limit is not None:
            COUNT.require(name, limit)
    rows: list[PackedRow] = []
    size = 0
    for row in _all_rows(datasets, row_bytes, chunk_bucket, max_documents):
        rows.append(row)
        size += int(text_positions(row).sum())
        if max_bytes is not None and size >= max_bytes:
            break
    if not size:
        names = ", ".join(dataset.name for dataset in datasets) or "no data set"
        raise ValueError(f"{names}: no text to evaluate on")
    return rows


def openings(rows: Sequence[PackedRow], max_bytes: int, *, length: int = OPENING_BYTES) -> list[PackedRow]:
    """The openings of evenly spread rows, together about ``max_bytes``, at least one: a cheap sample of all works.

    Short pieces can be stepped through side by side. Rows that open without text are passed over.
    """
    pieces = [row for row in rows if int(row.cu_seqlens[1]) > 1]
    wanted = min(len(pieces), max(1, round(max_bytes / length)))
    return [opening(pieces[(2 * number + 1) * len(pieces) // (2 * wanted)], length) for number in range(wanted)]


def opening(row: PackedRow, length: int) -> PackedRow:
    """A row of its own: as many tokens of the first segment as fit in ``length`` bytes behind BOS, at least one."""
    segment = int(row.cu_seqlens[1])
    ends = row.bits[:segment].nonzero()[:, 0]
    chunks = min(ends.shape[0], max(2, int((ends <= length).sum())))
    size = int(ends[chunks - 1]) + 1
    of_bytes = {name: getattr(row, name)[:size] for name in ("byte_ids", "bits", "labels", "is_real")}
    of_chunks = ("tokens", "token_labels", "token_mask", "token_ends_document")
    return PackedRow(
        **of_bytes,
        **{name: getattr(row, name)[:chunks] for name in of_chunks},
        cu_seqlens=torch.tensor([0, size], dtype=torch.int32, device=row.cu_seqlens.device),
        cu_chunks=torch.tensor([0, chunks], dtype=torch.int32, device=row.cu_chunks.device),
        chunk_bucket=1,
        documents=row.documents[:1],
    )


def _all_rows(
    datasets: Sequence[ByteTokenDataset], row_bytes: int, chunk_bucket: int, max_documents: int | None
) -> Iterator[PackedRow]:
    for dataset in datasets:
        documents = dataset.documents
        if max_documents is not None:
            documents = range(documents.start, min(documents.stop, documents.start + max_documents))
        yield from evaluation_rows(dataset.subset(documents), row_bytes=row_bytes, chunk_bucket=chunk_bucket)
