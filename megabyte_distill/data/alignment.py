"""Exact boundaries: which bytes of a document end a teacher token, and the proof that they are right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megabyte_distill.data.token_bytes import TokenBytes


class RebuildError(ValueError):
    """A document's tokens do not spell its bytes."""

    def __init__(self, message: str, *, document: int | str, offset: int) -> None:
        super().__init__(message)
        self.document = document
        """What the caller calls the document: its index, or file and line."""
        self.offset = offset
        """First byte that differs."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Exceptions with keyword arguments do not cross a process boundary by themselves."""
        return _rebuild_error, (str(self), self.document, self.offset)


def _rebuild_error(message: str, document: int | str, offset: int) -> RebuildError:
    return RebuildError(message, document=document, offset=offset)


def boundary_bits(tokens: NDArray[Any], table: TokenBytes) -> NDArray[np.bool_]:
    """[L] True where a byte ends a token; L is the tokens' total length. BOS is not part of ``tokens``.

    ValueError for a token without bytes: it could not be told from its neighbour.
    """
    lengths = table.lengths[tokens.astype(np.int64, copy=False)].astype(np.int64)
    if lengths.size and lengths.min() == 0:
        index = int(np.argmin(lengths))
        raise ValueError(f"token {index} (id {int(tokens[index])}) is special: it has no bytes and cannot be text")
    bits = np.zeros(int(lengths.sum()), dtype=np.bool_)
    bits[np.cumsum(lengths) - 1] = True
    return bits


def all_rebuild(sizes: Sequence[int], text: bytes, documents: Sequence[NDArray[Any]], table: TokenBytes) -> bool:
    """Whether many documents are what their tokens spell, at once.

    ``sizes``: bytes of each document; ``text``: all of them joined; ``documents``: tokens of each.
    """
    flat = np.concatenate(documents) if documents else np.zeros(0, dtype=np.int32)
    if flat.size and (int(flat.min()) < 0 or int(flat.max()) >= table.vocab_size):
        return False
    lengths = table.lengths[flat]
    ends = np.concatenate((np.zeros(1, dtype=np.int64), np.cumsum(lengths, dtype=np.int64)))
    cuts = np.cumsum([0, *(ids.size for ids in documents)])
    same_sizes = np.array_equal(np.diff(ends[cuts]), sizes)
    return same_sizes and bool(lengths.all()) and table.concatenate(flat).tobytes() == text


def check_rebuild(
    tokens: NDArray[Any], document_bytes: NDArray[np.uint8], table: TokenBytes, *, document: int | str
) -> None:
    """Returns if the tokens' bytes, concatenated, are the document's bytes; else RebuildError with the first offset."""
    if tokens.size and (int(tokens.min()) < 0 or int(tokens.max()) >= table.vocab_size):
        index = int(np.argmax((tokens < 0) | (tokens >= table.vocab_size)))
        offset = int(table.lengths[tokens[:index].astype(np.int64)].sum())
        raise RebuildError(
            f"document {document}: token {index} has id {int(tokens[index])}, outside the vocabulary of "
            f"{table.vocab_size} ids (byte {offset})",
            document=document,
            offset=offset,
        )
    rebuilt = table.concatenate(tokens)
    special = table.lengths[tokens.astype(np.int64, copy=False)] == 0
    if not special.any() and np.array_equal(rebuilt, document_bytes):
        return
    common = min(rebuilt.size, document_bytes.size)
    differs = np.flatnonzero(rebuilt[:common] != document_bytes[:common])
    offset = int(differs[0]) if differs.size else common
    reason = ""
    if special.any():
        index = int(np.argmax(special))
        before = int(table.lengths[tokens[:index].astype(np.int64)].sum())
        offset = min(offset, before)
        reason = f"; token {index} (id {int(tokens[index])}) is special or unknown and has no bytes"
    raise RebuildError(
        f"document {document}: its tokens do not rebuild its bytes, first difference at byte {offset} "
        f"(tokens give {rebuilt.size} bytes {rebuilt[offset : offset + 8].tobytes()!r}, the document has "
        f"{document_bytes.size} bytes {document_bytes[offset : offset + 8].tobytes()!r}){reason}",
        document=document,
        offset=offset,
    )
