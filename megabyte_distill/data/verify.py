"""Checks a stored data set against itself: every pointer, every byte, every token."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megabyte_distill.alphabet import BOS_BYTE
from megabyte_distill.data.alignment import all_rebuild, check_rebuild
from megabyte_distill.data.encoding import token_dtype
from megabyte_distill.data.formats import IndexedReader
from megabyte_distill.data.loss_mask import checked_spans, marked_count
from megabyte_distill.data.manifest import Manifest, StoredPaths
from megabyte_distill.data.progress import Show, silent
from megabyte_distill.data.token_bytes import TokenBytes

_BLOCK_BYTES = 4 << 20
_BLOCK_DOCUMENTS = 1 << 14


def find_stems(output: str | Path) -> list[str]:
    """The stems behind a stem PREFIX_KEY_document or behind the prefix of several. ValueError where there is none."""
    text = str(output).removesuffix(".idx").removesuffix(".bin")
    if text.endswith("_document"):
        return [text]
    folder, name = Path(text).parent, Path(text).name
    found = sorted(str(path.with_suffix("")) for path in folder.glob(f"{name}_*_document.idx"))
    if not found:
        raise ValueError(f"{output}: no data set {output}_KEY_document.idx; give --output-prefix as it was, or a stem")
    return found


def verify_dataset(stem: str, *, show: Show = silent) -> Manifest:
    """Reads a whole data set and returns its manifest if everything in it agrees; ``show`` counts documents.

    Checked: index against data without gap or overlap, counts against the manifest, BOS in front of each document and
    nowhere else, UTF-8, the teacher's start id (and end-of-text id), tokens against bytes, the token table's hash, the
    loss mask's spans.
    ValueError names the file or the document, and what to do.
    """
    paths = StoredPaths(stem)
    manifest = Manifest.load(paths.manifest)
    byte_reader = _verified(paths.byte_prefix, np.dtype(np.uint8))
    token_reader = table = None
    if manifest.has_tokens:
        table = _table(paths, manifest)
        token_reader = _verified(paths.token_prefix, token_dtype(table.vocab_size))
    mask_reader = _verified(paths.mask_prefix, np.dtype(np.int32)) if manifest.loss_mask else None
    _check_count(stem, "documents as bytes", len(byte_reader), manifest.documents)
    if token_reader is not None:
        _check_count(stem, "documents as tokens", len(token_reader), manifest.documents)
    if mask_reader is not None:
        _check_count(stem, "documents in the loss mask", len(mask_reader), manifest.documents)
    tokens = marked = 0
    with closing(show(f"verify {stem}", len(byte_reader), " documents")) as done:
        for first, last in _document_blocks(byte_reader):
            byte_ids, sizes = _block(byte_reader, first, last)
            _check_bytes(stem, byte_ids, sizes, first)
            if token_reader is not None and table is not None:
                flat, token_sizes = _block(token_reader, first, last)
                documents = _check_tokens(stem, flat, token_sizes, table, append_eod=manifest.append_eod, first=first)
                _check_rebuild(stem, byte_ids, sizes, documents, table, first)
                tokens += sum(ids.size for ids in documents)
            if mask_reader is not None:
                marked += sum(_checked_mask(stem, mask_reader, first + i, int(size)) for i, size in enumerate(sizes))
            done.advance(last - first)
    _check_count(stem, "bytes", byte_reader.bin_bytes - len(byte_reader), manifest.bytes)
    _check_count(stem, "tokens", tokens, manifest.tokens)
    _check_count(stem, "marked bytes", marked, manifest.marked)
    return manifest


def _verified(prefix: Path, dtype: np.dtype[Any]) -> IndexedReader:
    """A reader whose whole index was checked: items without gap, dtype, one document an item."""
    reader = IndexedReader(prefix)
    if reader.dtype != dtype:
        raise ValueError(f"{reader.idx_path}: items of {reader.dtype}, expected {dtype}: damaged, preprocess again")
    reader.verify()
    index = reader.document_index
    if index.size != len(reader) + 1:
        raise ValueError(
            f"{reader.idx_path}: document index of {index.size}, expected {len(reader) + 1} entries: damaged"
        )
    for first in range(0, index.size, _BLOCK_DOCUMENTS):
        block = np.asarray(index[first : first + _BLOCK_DOCUMENTS])
        wrong = np.flatnonzero(block != np.arange(first, first + block.size))
        if wrong.size:
            place = first + int(wrong[0])
            raise ValueError(f"{reader.idx_path}: document index {place} says {int(block[wrong[0]])}: damaged")
    return reader


def _table(paths: StoredPaths, manifest: Manifest) -> TokenBytes:
    table = TokenBytes.load(paths.token_table)
    if table.hash != manifest.tokenizer_hash or table.vocab_size != manifest.vocab_size:
        raise ValueError(
            f"{paths.token_table}: hash {table.hash} of {table.vocab_size} ids, the manifest says "
            f"{manifest.tokenizer_hash} of {manifest.vocab_size}: files of different runs, preprocess again"
        )
    return table


def _check_count(stem: str, what: str, found: int, expected: int) -> None:
    if found != expected:
        raise ValueError(f"{stem}: {found} {what}, {expected} in the manifest: damaged, preprocess again")


def _document_blocks(reader: IndexedReader) -> Iterator[tuple[int, int]]:
    """Ranges of documents of a few MiB each."""
    first = 0
    while first < len(reader):
        sizes = np.cumsum(reader.lengths[first : first + _BLOCK_DOCUMENTS], dtype=np.int64)
        last = first + max(1, int(np.searchsorted(sizes, _BLOCK_BYTES, side="right")))
        yield first, last
        first = last


def _block(reader: IndexedReader, first: int, last: int) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Items ``first`` … ``last`` one after the other, and the size of each."""
    items = [reader.read(item) for item in range(first, last)]
    return np.concatenate(items), np.array([item.size for item in items], dtype=np.int64)


def _check_bytes(stem: str, byte_ids: NDArray[np.uint8], sizes: NDArray[np.int64], first: int) -> None:
    """BOS in front of each document and nowhere else, and UTF-8 behind it."""
    ends = np.cumsum(sizes)
    empty = np.flatnonzero(sizes < 1)
    if empty.size:
        raise ValueError(f"{stem}: document {first + int(empty[0])} has not even BOS: damaged, preprocess again")
    is_bos, expected = byte_ids == BOS_BYTE, np.zeros(byte_ids.size, dtype=np.bool_)
    expected[ends - sizes] = True
    wrong = np.flatnonzero(is_bos != expected)
    if wrong.size:
        document, place = _locate(ends, sizes, int(wrong[0]))
        problem = "does not begin with BOS" if place == 0 else f"has BOS {BOS_BYTE} at byte {place - 1} of its text"
        raise ValueError(f"{stem}: document {first + document} {problem}: damaged, preprocess again")
    try:
        np.where(is_bos, np.uint8(10), byte_ids).tobytes().decode()  # BOS is no UTF-8, a newline ends any character
    except UnicodeDecodeError as error:
        document, place = _locate(ends, sizes, error.start)
        raise ValueError(
            f"{stem}: document {first + document} is not UTF-8 at byte {place - 1} ({error.reason}): damaged, "
            "preprocess again"
        ) from error


def _locate(ends: NDArray[np.int64], sizes: NDArray[np.int64], place: int) -> tuple[int, int]:
    """(document of the block, element of its item) of an element of the block."""
    document = int(np.searchsorted(ends, place, side="right"))
    return document, place - int(ends[document] - sizes[document])


def _check_tokens(
    stem: str, tokens: NDArray[Any], sizes: NDArray[np.int64], table: TokenBytes, *, append_eod: bool, first: int
) -> list[NDArray[Any]]:
    """The start id in front, the end-of-text id behind where it was asked for; returns each document's text tokens."""
    documents = []
    for index, item in enumerate(np.split(tokens, np.cumsum(sizes)[:-1])):
        events = [table.start_id, table.end_of_text_id] if append_eod else [table.start_id]
        found = [*item[:1].tolist(), *(item[1:][-1:].tolist() if append_eod else [])]
        if found != events:
            raise ValueError(
                f"{stem}: document {first + index} has the tokens {found} around its text, expected {events}: damaged, "
                "preprocess again"
            )
        documents.append(item[1:-1] if append_eod else item[1:])
    return documents


def _checked_mask(stem: str, reader: IndexedReader, document: int, size: int) -> int:
    """Bytes that the mask marks of a document whose item has ``size`` bytes, BOS included."""
    return marked_count(checked_spans(reader.read(document), size - 1, stem, document))


def _check_rebuild(
    stem: str,
    byte_ids: NDArray[np.uint8],
    sizes: NDArray[np.int64],
    documents: list[NDArray[Any]],
    table: TokenBytes,
    first: int,
) -> None:
    """Each document is what its tokens spell; all at once, one by one where something is wrong."""
    text = byte_ids[byte_ids != BOS_BYTE].tobytes()
    raw = [item[1:] for item in np.split(byte_ids, np.cumsum(sizes)[:-1])]
    if not all_rebuild([part.size for part in raw], text, documents, table):
        for index, (part, ids) in enumerate(zip(raw, documents, strict=True)):
            check_rebuild(ids, part, table, document=f"{first + index} of {stem}")
