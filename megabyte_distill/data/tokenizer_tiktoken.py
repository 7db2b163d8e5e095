"""A tiktoken rank file: base64 of a token's bytes and its rank, a line each."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, normalizers

from megabyte_distill.data.tokenizer_fast import TiktokenEncoder, plain_ids
from megabyte_distill.data.tokenizer_identity import identity_of
from megabyte_distill.data.tokenizer_ids import SpecialIds, size_with
from megabyte_distill.data.tokenizer_normal_form import is_normal
from megabyte_distill.data.tokenizer_pattern import NoFastPath
from megabyte_distill.data.tokenizer_rank_files import KNOWN_RANK_FILES, digest_of, known_rank_file
from megabyte_distill.data.tokenizer_ranks import Ranks, tokenizer_of
from megabyte_distill.data.tokenizer_selftest import first_difference, selftest_texts
from megabyte_distill.data.tokenizers import EncodingError, TokenizerKind


class TiktokenTokenizer:
    """See :class:`megabyte_distill.data.tokenizers.DocumentTokenizer`. Normalises as the published tokenizer does, for
    other rank files not at all."""

    kind = TokenizerKind.TIKTOKEN

    def __init__(self, path: Path, ids: SpecialIds, *, pattern: str | None = None) -> None:
        """``pattern`` may be left out for known rank files. ValueError for a damaged file or an unknown pattern."""
        self.path = path
        ranks = _read_ranks(path)
        known = known_rank_file(ranks)
        if not pattern and known is not None:
            pattern = known.pattern
        if not pattern:
            raise ValueError(
                f"{path}: {len(ranks)} ranks, of which the split pattern is not known (known: "
                + ", ".join(f"{file.name}'s own {file.ranks}" for file in KNOWN_RANK_FILES)
                + "); give the pattern, or use the model's tokenizer.json"
            )
        self.encoder = "tiktoken, whose ranks these are" + (f" (those of {known.name})" if known else "")
        self._ranks = ranks
        self._pattern = pattern
        self._form = known.normal_form if known else None
        self._normalizer: normalizers.Normalizer | None = None
        if self._form:  # by tokenizers, so that the text is that of the model's tokenizer.json
            self._normalizer = getattr(normalizers, self._form)()
        try:
            self._fast = TiktokenEncoder(path.stem, self._pattern, Ranks(ranks, None), self.encode_batch_reference)
        except Exception as error:
            raise ValueError(f"{path}: tiktoken does not take these ranks and pattern ({error})") from error
        try:
            size = size_with(known.vocab_size if known else len(ranks), ids, ranks)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        tokens: list[bytes | None] = [None] * size
        for token, rank in ranks.items():
            tokens[rank] = token
        self.token_bytes = ids.table(tokens, known.specials if known else {}, path)

    @cached_property
    def segmentation_hash(self) -> str:
        """See :class:`megabyte_distill.data.tokenizers.DocumentTokenizer`."""
        return identity_of(
            self.token_bytes,
            kind=self.kind,
            ranks=digest_of(self._ranks),
            pattern=self._pattern,
            normal_form=self._form,
        )

    def normalize(self, text: str) -> str:
        """The text in the normal form of a known rank file, otherwise the text itself."""
        if self._form is None or self._normalizer is None or is_normal(text, self._form):
            return text
        return self._normalizer.normalize_str(text)

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """Tokens of each text, int32 [T]. EncodingError for a text that only tokenizers manages, where it cannot be
        used."""
        return self._fast.encode_batch(texts)

    def encode_batch_reference(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """Tokens of each text, int32 [T], by tokenizers with merges made of the ranks: for texts such as a megabyte of
        spaces, on which tiktoken breaks down. EncodingError where the ids would not be the same."""
        return plain_ids(self._reference, texts) if texts else []

    @cached_property
    def _reference(self) -> Tokenizer:
        """Takes seconds, and most corpora do not need it. EncodingError for the first text where it cannot be used."""
        try:
            reference = tokenizer_of(self._ranks, self._pattern)
            texts = selftest_texts(list(self._ranks))
            different = first_difference(
                lambda batch: list(map(self._fast.encode, batch)), lambda batch: plain_ids(reference, batch), texts
            )
            if different is not None:
                raise NoFastPath(f"other ids for {different[:20]!r}")
        except NoFastPath as error:
            raise EncodingError(
                f"{self.path}: tiktoken breaks down on runs of thousands of spaces, and tokenizers cannot step in "
                f"({error}); shorten such runs, or use the model's tokenizer.json",
                index=0,
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
