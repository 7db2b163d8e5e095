"""Rows without files, for ``--mock-data``: random tokens of a made-up vocabulary and the bytes they spell."""

from __future__ import annotations

import random

import numpy as np
from numpy.typing import NDArray

from megabyte_distill.alphabet import BOS_BYTE
from megabyte_distill.data.sampler import RowStream
from megabyte_distill.data.token_bytes import TokenBytes

MOCK_TURN_BYTES = 9
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


def worded_table(vocab_size: int, *, specials: int = 256, seed: int = 0) -> TokenBytes:
    """A made-up table of ``vocab_size`` ids whose prefixes branch about as those of a large byte-level BPE.

    Single bytes, runs of spaces, numbers, words of shared syllables with and without a space or a capital, characters
    of two to four bytes, whole and cut, alone and joined. The last ``specials`` ids are special, the first of them
    ends documents. ValueError for fewer than 1,000 other ids.
    """
    wanted = vocab_size - specials
    if wanted < 1000:
        raise ValueError(f"a vocabulary of {vocab_size} ids with {specials} special ones; expected 1,000 others")
    choose = random.Random(seed)
    syllables = [
        "".join(choose.choice("bcdfghklmnprstvw") + choose.choice("aeiou") for _ in range(choose.choice((1, 1, 2))))
        for _ in range(700)
    ]
    scripts = [(0x400, 0x450), (0x620, 0x650), (0x900, 0x970), (0x3041, 0x30FF), (0x4E00, 0x9000), (0x1F300, 0x1F650)]
    # a dict keeps the order: the same seed gives the same ids everywhere
    tokens: dict[bytes, None] = {bytes([byte]): None for byte in range(BOS_BYTE)}
    tokens.update({b" " * size: None for size in range(2, 129)})
    tokens.update({str(number).zfill(3).encode(): None for number in range(1000)})
    while len(tokens) < wanted:
        if choose.random() < 0.75:
            # low numbers come more often, so that prefixes are shared
            parts = [syllables[int(len(syllables) * choose.random() ** 3)] for _ in range(choose.randint(1, 3))]
            word = "".join(parts)
            text = (choose.choice(("", " ", " ")) + choose.choice((word, word, word.title()))).encode()
        else:
            low, high = choose.choice(scripts)
            characters = [
                chr(low + int((high - low) * choose.random() ** 2)) for _ in range(choose.choice((1, 1, 2, 3)))
            ]
            text = (choose.choice(("", " ")) + "".join(characters)).encode()
            text = text[: len(text) - choose.choice((0, 0, 0, 1, 2))] or text
        tokens[text] = None
    pieces = [*tokens][:wanted]
    choose.shuffle(pieces)
    return TokenBytes.from_list([*pieces, *[None] * specials], end_of_text_id=wanted, bos_id=None)


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

    def marked(self, document: int, start: int, stop: int) -> NDArray[np.bool_]:
        """Prompts and answers of equal length in turn."""
        return np.asarray(np.arange(start, stop) // MOCK_TURN_BYTES % 2 == 1)


class MockRowStream(RowStream):
    """A :class:`RowStream` that needs nothing but a vocabulary size."""

    def __init__(
        self, vocab_size: int, *, row_bytes: int, chunk_bucket: int, seed: int, reads_loss_mask: bool = False
    ) -> None:
        super().__init__(
            [MockDataset(vocab_size, seed=seed)],
            row_bytes=row_bytes,
            chunk_bucket=chunk_bucket,
            seed=seed,
            reads_loss_mask=reads_loss_mask,
        )
