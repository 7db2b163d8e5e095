"""Counts that show whether a tokenizer is exact on a corpus."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megabyte_distill.data.alignment import RebuildError, check_rebuild
from megabyte_distill.data.tokenizers import DocumentTokenizer


@dataclass(slots=True)
class TokenizerCheck:
    """What was seen of a corpus so far."""

    documents: int = 0
    bytes: int = 0
    """Of the documents, after normalisation."""
    tokens: int = 0
    normalized: int = 0
    """Documents that normalisation changed."""
    not_rebuilt: int = 0
    """Documents that their tokens do not spell: must be 0."""
    different_ids: int = 0
    """Documents of which the chosen encoder and the reference give different ids: must be 0."""
    split_characters: int = 0
    """Tokens that start or end inside a character; they stay as they are."""
    encoder_seconds: float = 0.0
    reference_seconds: float = 0.0

    def add(self, tokenizer: DocumentTokenizer, texts: Sequence[str]) -> None:
        """Encodes texts as they stand in a corpus with both encoders of a tokenizer and counts."""
        documents = [tokenizer.normalize(text) for text in texts]
        start = time.perf_counter()
        encoded = tokenizer.encode_batch(documents)
        between = time.perf_counter()
        references = tokenizer.encode_batch_reference(documents)
        self.encoder_seconds += between - start
        self.reference_seconds += time.perf_counter() - between
        self.normalized += sum(document != text for document, text in zip(documents, texts, strict=True))
        for document, ids, reference in zip(documents, encoded, references, strict=True):
            raw = np.frombuffer(document.encode(), dtype=np.uint8)
            self.documents += 1
            self.bytes += raw.size
            self.tokens += ids.size
            self.different_ids += not np.array_equal(ids, reference)
            try:
                check_rebuild(ids, raw, tokenizer.token_bytes, document=self.documents)
            except RebuildError:
                self.not_rebuilt += 1
                continue
            # A cut inside a character has a continuation byte behind it; the document's own ends are none.
            cuts = np.concatenate(([0], np.cumsum(tokenizer.token_bytes.lengths[ids], dtype=np.int64)))
            inside = np.append((raw & 0xC0) == 0x80, False)[cuts]
            self.split_characters += int((inside[:-1] | inside[1:]).sum())
