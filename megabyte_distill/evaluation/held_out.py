"""The rows on which a run is judged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from megabyte_distill.config.blend import parse_blend
from megabyte_distill.data.dataset import ByteTokenDataset
from megabyte_distill.data.manifest import StoredPaths
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
        if limit is not None and limit < 1:
            raise ValueError(f"{name} is {limit}; expected at least 1")
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
    of_bytes = {name: getattr(row, name)[:size] for name in ("byte_ids", "bits", "labels", "loss_mask")}
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


def set_names(words: Sequence[str]) -> dict[str, str]:
    """Name → stem of data sets given as STEM or NAME=STEM, weights between them left out.

    A stem alone is called by its last part without ``_document``; where two would be called alike, by the whole stem.
    ValueError for a name that is given twice.
    """
    pairs = [_named(entry.stem) for entry in parse_blend(words)]
    short = [Path(stem).name.removesuffix("_document") for _, stem in pairs]
    names: dict[str, str] = {}
    for (given, stem), own in zip(pairs, short, strict=True):
        name = given or (own if short.count(own) == 1 else stem)
        if name in names:
            raise ValueError(f"two data sets are called {name!r}; give them names, as first={names[name]}")
        names[name] = stem
    return names


def _named(word: str) -> tuple[str, str]:
    """(name, stem) of NAME=STEM; a stem that has a "=" in it and exists is taken as it stands."""
    name, separator, stem = word.partition("=")
    is_stem = not separator or "/" in name or StoredPaths(word).manifest.exists()
    return ("", word) if is_stem else (name, stem)
