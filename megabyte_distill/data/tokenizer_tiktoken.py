"""A tiktoken rank file: base64 of a token's bytes and its rank, a line each."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from megabyte_distill.data.tokenizer_fast import TiktokenEncoder, plain_ids
from megabyte_distill.data.tokenizer_ids import SpecialIds
from megabyte_distill.data.tokenizer_pattern import NoFastPath
from megabyte_distill.data.tokenizer_ranks import Ranks, tokenizer_of
from megabyte_distill.data.tokenizer_selftest import first_difference, selftest_texts
from megabyte_distill.data.tokenizers import TokenizerKind

LLAMA3_RANKS = 128_000
LLAMA3_PATTERN = "|".join(
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
"""How Llama 3 cuts text before merging."""
_LLAMA3_SPECIALS = 256


class TiktokenTokenizer:
    """See :class:`megabyte_distill.data.tokenizers.DocumentTokenizer`. No normalisation."""

    kind = TokenizerKind.TIKTOKEN
    encoder = "tiktoken, whose ranks these are"

    def __init__(self, path: Path, ids: SpecialIds, *, pattern: str | None = None) -> None:
        """``pattern`` may be left out for Llama 3 only. ValueError for a damaged file or an unknown pattern."""
        self.path = path
        ranks = _read_ranks(path)
        is_llama3 = pattern is None and len(ranks) == LLAMA3_RANKS
        if pattern is None and not is_llama3:
            raise ValueError(
                f"{path}: {len(ranks)} ranks, of which the split pattern is not known (Llama 3 has {LLAMA3_RANKS}); "
                "give the pattern, or use the model's tokenizer.json"
            )
        specials: dict[str, int] = {}
        size = len(ranks)
        if is_llama3:
            specials = {"<|begin_of_text|>": LLAMA3_RANKS, "<|end_of_text|>": LLAMA3_RANKS + 1}
            size += _LLAMA3_SPECIALS
        for named in (ids.end_of_text, ids.bos):
            if isinstance(named, int):
                size = max(size, named + 1)
        self._ranks = ranks
        self._pattern = pattern or LLAMA3_PATTERN
        try:
            self._fast = TiktokenEncoder(path.stem, self._pattern, Ranks(ranks, None), self.encode_batch_reference)
        except Exception as error:
            raise ValueError(f"{path}: tiktoken does not take these ranks and pattern ({error})") from error
        tokens: list[bytes | None] = [None] * size
        for token, rank in ranks.items():
            tokens[rank] = token
        self.token_bytes = ids.table(tokens, specials, path)

    def normalize(self, text: str) -> str:
        """The text itself."""
        return text

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """Tokens of each text, int32 [T]. ValueError for a text that only tokenizers manages, if it cannot be used."""
        return self._fast.encode_batch(texts)

    def encode_batch_reference(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """Tokens of each text, int32 [T], by tokenizers with merges made of the ranks: for texts such as a megabyte of
        spaces, on which tiktoken breaks down. ValueError where the ids would not be the same."""
        return plain_ids(self._reference, texts)

    @cached_property
    def _reference(self) -> Tokenizer:
        """Takes seconds, and most corpora do not need it."""
        try:
            reference = tokenizer_of(self._ranks, self._pattern)
            texts = selftest_texts(list(self._ranks))
            different = first_difference(
                lambda batch: list(map(self._fast.encode, batch)), lambda batch: plain_ids(reference, batch), texts
            )
            if different is not None:
                raise NoFastPath(f"other ids for {different[:20]!r}")
        except NoFastPath as error:
            raise ValueError(
                f"{self.path}: tiktoken breaks down on runs of thousands of spaces, and tokenizers cannot step in "
                f"({error}); shorten such runs, or use the model's tokenizer.json"
            ) from error
        return reference


def _read_ranks(path: Path) -> dict[bytes, int]:
    """Token → rank; ValueError names the first bad line. Ranks must be 0 … N − 1, each once."""
    ranks: dict[bytes, int] = {}
    with open(path, "rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
            except (ValueError, binascii.Error) as error:
                raise ValueError(f"{path}, line {number}: expected base64 and a rank, got {line[:60]!r}") from error
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError(f"{path}: {len(ranks)} ranks that are not 0 … {len(ranks) - 1}, each once: damaged file")
    return ranks
