"""Rows without files, for ``--mock-data``: random tokens of a made-up vocabulary and the bytes they spell."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from megabyte_distill.data.sampler import RowStream
from megabyte_distill.data.token_bytes import TokenBytes

_LETTERS = b"etaoinshrdlucmfwypvbgkjqxz "


def mock_table(vocab_size: int) -> TokenBytes:
    """A table of ``vocab_size`` ids, W ≥ 2: id 0 starts and ends documents, the others are short distinct words."""
    if vocab_size < 2:
        raise ValueError(f"vocabulary of {vocab_size} ids; mock data needs at least 2")
    words: list[bytes | None] = [None]
    for number in range(vocab_size - 1):
        word, rest = b"", number + 1
        while rest:  # bijective numeration: every number has its own word
            rest, digit = divmod(rest - 1, len(_LETTERS))
            word = _LETTERS[digit : digit + 1] + word
        words.append(word)
    return TokenBytes.from_list(words, end_of_text_id=0, bos_id=0)


class MockDataset:
    """A DocumentSource of random documents, each a function of (seed, document)."""

    def __init__(self, vocab_size: int, *, seed: int, num_documents: int = 10_000, max_tokens: int = 1000) -> None:
        self.name = "mock data"
        self.documents = range(num_documents)
        self.digest = f"mock data {vocab_size} {seed} {num_documents} {max_tokens}"
        self.table = mock_table(vocab_size)
        self._seed, self._max_tokens = seed, max_tokens

    def _document(self, document: int) -> NDArray[np.int64]:
        generator = np.random.default_rng((self._seed, document))
        return generator.integers(1, self.table.vocab_size, size=int(generator.integers(0, self._max_tokens + 1)))

    def num_tokens(self, document: int) -> int:
        return int(self._document(document).size)

    def tokens(self, document: int, start: int, stop: int) -> NDArray[np.int64]:
        return self._document(document)[start:stop]

    def byte_ids(self, document: int, start: int, stop: int | None) -> NDArray[np.uint8]:
        return self.table.concatenate(self._document(document))[start:stop]


class MockRowStream(RowStream):
    """A :class:`RowStream` that needs nothing but a vocabulary size."""

    def __init__(self, vocab_size: int, *, row_bytes: int, chunk_bucket: int, seed: int) -> None:
        super().__init__(
            [MockDataset(vocab_size, seed=seed)], row_bytes=row_bytes, chunk_bucket=chunk_bucket, seed=seed
        )
