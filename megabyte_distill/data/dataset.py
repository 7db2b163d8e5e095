"""A stored data set of documents as bytes and teacher tokens, its split, and blends on the command line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from megabyte_distill.alphabet import BOS_BYTE
from megabyte_distill.config.blend import parse_blend
from megabyte_distill.data.alignment import boundary_bits, check_rebuild
from megabyte_distill.data.formats import IndexedReader
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
        self._bytes = IndexedReader(paths.byte_prefix)
        self._tokens = IndexedReader(paths.token_prefix)
        self.manifest = Manifest.load(paths.manifest)
        self.table = TokenBytes.load(paths.token_table)
        if self._bytes.dtype != np.uint8:
            raise ValueError(
                f"{self._bytes.idx_path}: items of {self._bytes.dtype}, expected uint8 bytes: not a byte data set"
            )
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
        return self._tokens.length(document) - 1

    def num_bytes(self, document: int) -> int:
        """Bytes of a document, without BOS."""
        return self._bytes.length(document) - 1

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

    def __getitem__(self, document: int) -> Document:
        """A whole document by its global index, verified."""
        first_byte = self._bytes.read(document, 0, min(1, self._bytes.length(document)))
        first_token = self._tokens.read(document, 0, min(1, self._tokens.length(document)))
        if first_byte.tolist() != [BOS_BYTE] or first_token.tolist() != [self.table.start_id]:
            raise ValueError(
                f"{self.name}: document {document} starts with byte {first_byte.tolist()} and token "
                f"{first_token.tolist()}, expected BOS {BOS_BYTE} and {self.table.start_id}: damaged, preprocess again"
            )
        tokens = self.tokens(document, 0, self.num_tokens(document))
        byte_ids = self.byte_ids(document, 0, None)
        check_rebuild(tokens, byte_ids, self.table, document=f"{document} of {self.name}")
        return Document(byte_ids, tokens, boundary_bits(tokens, self.table))


def split_documents(documents: int, shares: tuple[float, float, float]) -> tuple[range, range, range]:
    """Contiguous ranges for training, validation and test (``config.blend.parse_split`` gives the shares).

    Held-out quality should be read on whole works: give them as their own data set.
    """
    cuts = [0, *(round(documents * sum(shares[: i + 1]) / sum(shares)) for i in range(3))]
    return range(cuts[0], cuts[1]), range(cuts[1], cuts[2]), range(cuts[2], cuts[3])


def open_blend(
    data_path: Sequence[str], *, tokenizer_hash: str | None = None
) -> tuple[list[ByteTokenDataset], list[float]]:
    """The data sets of ``--data-path`` and their weights; without weights, each counts by its bytes."""
    entries = parse_blend(data_path)
    if not entries:
        raise ValueError("--data-path: expected at least one stem PREFIX_KEY_document")
    datasets = [ByteTokenDataset(entry.stem, tokenizer_hash=tokenizer_hash) for entry in entries]
    weights = [
        float(max(1, dataset.manifest.bytes)) if entry.weight is None else entry.weight
        for entry, dataset in zip(entries, datasets, strict=True)
    ]
    return datasets, weights
