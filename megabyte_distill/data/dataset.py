"""A stored data set of documents as bytes and teacher tokens, its split, and blends on the command line."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from megabyte_distill.alphabet import BOS_BYTE
from megabyte_distill.config.blend import parse_blend
from megabyte_distill.data.alignment import boundary_bits, check_rebuild
from megabyte_distill.data.formats import IndexedReader
from megabyte_distill.data.loss_mask import checked_spans, marked_between
from megabyte_distill.data.manifest import Manifest, StoredPaths
from megabyte_distill.data.token_bytes import TokenBytes


class Document(NamedTuple):
    """One document without BOS."""

    byte_ids: NDArray[np.uint8]
    """[L]"""
    tokens: NDArray[np.int64]
    """[T]"""
    bits: NDArray[np.bool_]
    """[L] True where a byte ends a token."""


class DocumentSource(Protocol):
    """What rows are made from. Documents are known by their global index, an element of ``documents``."""

    name: str
    documents: range
    table: TokenBytes
    digest: str
    """Says which data these are, wherever they lie."""

    def num_tokens(self, document: int) -> int:
        """Tokens of a document, without the start id."""
        ...

    def tokens(self, document: int, start: int, stop: int) -> NDArray[np.int64]:
        """Tokens ``start`` … ``stop`` of a document."""
        ...

    def byte_ids(self, document: int, start: int, stop: int | None) -> NDArray[np.uint8]:
        """Bytes ``start`` … ``stop`` of a document; None reads to its end."""
        ...

    def marked(self, document: int, start: int, stop: int) -> NDArray[np.bool_]:
        """[stop − start] whether bytes are trained on; the number behind the last byte is the document's end.

        ValueError where nothing is marked in these data.
        """
        ...


class ByteTokenDataset:
    """A data set written by preprocessing. Arrays handed out are copies.

    Opening costs the same for any number of documents. Every read of a whole document and every materialised row is
    checked against the token table; a mismatch is a ValueError that names the document.
    """

    def __init__(self, stem: str, *, tokenizer_hash: str | None = None) -> None:
        """``stem`` is PREFIX_{key}_document. ``tokenizer_hash``, where given, must be the data set's own.

        ValueError for missing, truncated or contradicting files and for another tokenizer.
        """
        paths = StoredPaths(stem)
        self.name = stem
        self._bytes = _reader(paths.byte_prefix, "bytes", (np.uint8,))
        self.manifest = Manifest.load(paths.manifest)
        if not self.manifest.has_tokens:
            raise ValueError(
                f"{stem}: bytes only, without a teacher's tokens; preprocess the text with the teacher's tokenizer"
            )
        self._tokens = _reader(paths.token_prefix, "tokens", (np.uint16, np.int32))
        self.table = TokenBytes.load(paths.token_table)
        counts = (len(self._bytes), len(self._tokens), self.manifest.documents)
        if len(set(counts)) != 1:
            raise ValueError(
                f"{stem}: {counts[0]} documents as bytes, {counts[1]} as tokens, {counts[2]} in the manifest: files of "
                "different runs, preprocess again"
            )
        if self.table.hash != self.manifest.tokenizer_hash:
            raise ValueError(
                f"{paths.token_table}: hash {self.table.hash}, the manifest says {self.manifest.tokenizer_hash}: files "
                "of different runs, preprocess again"
            )
        if tokenizer_hash is not None and self.table.hash != tokenizer_hash:
            raise ValueError(
                f"{stem}: made with another tokenizer (hash {self.table.hash}, expected {tokenizer_hash}); preprocess "
                "the text with the teacher's tokenizer"
            )
        self.has_loss_mask = self.manifest.loss_mask
        self._mask = _reader(paths.mask_prefix, "loss mask", (np.int32,)) if self.has_loss_mask else None
        if self._mask is not None and len(self._mask) != len(self._bytes):
            raise ValueError(
                f"{self._mask.idx_path}: {len(self._mask)} documents, {len(self._bytes)} as bytes: files of different "
                "runs, preprocess again"
            )
        self.documents = range(len(self._bytes))
        self.digest = self.manifest.digest

    def subset(self, documents: range) -> ByteTokenDataset:
        """The same files, fewer documents; global indices stay."""
        if documents and not (documents.step == 1 and documents.start >= 0 and documents.stop <= len(self._bytes)):
            raise ValueError(f"{self.name}: documents {documents} of {len(self._bytes)}")
        view = object.__new__(ByteTokenDataset)
        view.__dict__.update(self.__dict__)
        view.documents = documents
        return view

    def __len__(self) -> int:
        return len(self.documents)

    def num_tokens(self, document: int) -> int:
        """Tokens of a document, without the start id and without an end-of-text id that the items have."""
        return self._own_length(self._tokens, document, 1 + int(self.manifest.append_eod))

    def num_bytes(self, document: int) -> int:
        """Bytes of a document, without BOS."""
        return self._own_length(self._bytes, document, 1)

    def sizes(self) -> NDArray[np.int64]:
        """Bytes of each of ``documents``, without BOS."""
        return np.asarray(self._bytes.lengths[self.documents.start : self.documents.stop], dtype=np.int64) - 1

    def _own_length(self, reader: IndexedReader, document: int, marks: int) -> int:
        """Length of an item without the ``marks`` elements that are not the document's."""
        length = reader.length(document)
        if length < marks:
            raise ValueError(
                f"{reader.idx_path}: document {document} has {length} elements, expected at least {marks}: damaged, "
                "preprocess again"
            )
        return length - marks

    def tokens(self, document: int, start: int, stop: int) -> NDArray[np.int64]:
        tokens = self._tokens.read(document, start + 1, stop + 1).astype(np.int64)
        if tokens.size and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.table.vocab_size:
            raise ValueError(
                f"{self.name}: document {document} has token ids from {int(tokens.min())} to {int(tokens.max())}, "
                f"expected 0 … {self.table.vocab_size - 1}: damaged, preprocess again"
            )
        return tokens

    def byte_ids(self, document: int, start: int, stop: int | None) -> NDArray[np.uint8]:
        return self._bytes.read(document, start + 1, None if stop is None else stop + 1)

    def spans(self, document: int) -> NDArray[np.int32]:
        """The spans of loss_mask.py; ValueError without a mask, or where they do not fit the document."""
        if self._mask is None:
            raise ValueError(f"{self.name}: no loss mask; preprocess dialogues with --chat-template")
        return checked_spans(self._mask.read(document), self.num_bytes(document), self.name, document)

    def marked(self, document: int, start: int, stop: int) -> NDArray[np.bool_]:
        return marked_between(self.spans(document), start, stop)

    def __getitem__(self, document: int) -> Document:
        """A whole document by its global index, verified."""
        num_bytes, num_tokens = self.num_bytes(document), self.num_tokens(document)
        first_byte, first_token = int(self._bytes.read(document, 0, 1)[0]), int(self._tokens.read(document, 0, 1)[0])
        if first_byte != BOS_BYTE or first_token != self.table.start_id:
            raise ValueError(
                f"{self.name}: document {document} starts with byte {first_byte} and token {first_token}, expected BOS "
                f"{BOS_BYTE} and {self.table.start_id}: damaged, preprocess again"
            )
        if self.manifest.append_eod:
            last_token = int(self._tokens.read(document, num_tokens + 1, num_tokens + 2)[0])
            if last_token != self.table.end_of_text_id:
                raise ValueError(
                    f"{self.name}: document {document} ends with token {last_token}, expected the end-of-text id "
                    f"{self.table.end_of_text_id}, which the manifest promises: damaged, preprocess again"
                )
        tokens = self.tokens(document, 0, num_tokens)
        byte_ids = self.byte_ids(document, 0, num_bytes)
        check_rebuild(tokens, byte_ids, self.table, document=f"{document} of {self.name}")
        return Document(byte_ids, tokens, boundary_bits(tokens, self.table))


def _reader(prefix: Path, what: str, dtypes: tuple[type, ...]) -> IndexedReader:
    """Opens one pair of files; ValueError where its items are not of one of ``dtypes``."""
    reader = IndexedReader(prefix)
    if reader.dtype not in dtypes:
        expected = " or ".join(np.dtype(dtype).name for dtype in dtypes)
        raise ValueError(f"{reader.idx_path}: items of {reader.dtype}, expected {expected}: not a document's {what}")
    return reader


def split_documents(documents: int, shares: tuple[float, float, float]) -> tuple[range, range, range]:
    """Contiguous ranges for training, validation and test (``config.blend.parse_split`` gives the shares).

    Held-out quality should be read on whole works: give them as their own data set.
    """
    cuts = [0, *(round(documents * sum(shares[: i + 1]) / sum(shares)) for i in range(3))]
    return range(cuts[0], cuts[1]), range(cuts[1], cuts[2]), range(cuts[2], cuts[3])


class Part(IntEnum):
    """The parts that ``--split`` makes of each data set."""

    TRAINING = 0
    VALIDATION = 1
    TEST = 2


class Blend(NamedTuple):
    """Data sets and their weights, which need not sum to one."""

    datasets: list[ByteTokenDataset]
    weights: list[float]

    def part(self, part: Part, shares: tuple[float, float, float] | None) -> Blend:
        """Of each set the documents of one part of a split, which may be none; of a blend that is not split, all."""
        if shares is None:
            return self
        cut = [dataset.subset(split_documents(len(dataset), shares)[part]) for dataset in self.datasets]
        return Blend(cut, self.weights)

    def without_empty(self) -> Blend:
        """Only the sets that have documents."""
        kept = [pair for pair in zip(self.datasets, self.weights, strict=True) if len(pair[0])]
        return Blend([dataset for dataset, _ in kept], [weight for _, weight in kept])


def open_blend(data_path: Sequence[str], *, tokenizer_hash: str | None = None) -> Blend:
    """The data sets of ``--data-path`` and their weights; without weights, each counts by its bytes."""
    entries = parse_blend(data_path)
    if not entries:
        raise ValueError("--data-path: expected at least one stem PREFIX_KEY_document")
    datasets = [ByteTokenDataset(entry.stem, tokenizer_hash=tokenizer_hash) for entry in entries]
    tables: dict[tuple[str, int], TokenBytes] = {}
    for dataset in datasets:  # hundreds of data sets keep one table, not one each
        dataset.table = tables.setdefault((dataset.table.hash, dataset.table.vocab_size), dataset.table)
    weights = [
        float(max(1, dataset.manifest.bytes)) if entry.weight is None else entry.weight
        for entry, dataset in zip(entries, datasets, strict=True)
    ]
    return Blend(datasets, weights)
