"""What one preprocessing worker does: raw records to verified bytes and tokens."""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megabyte_distill.alphabet import BOS_BYTE
from megabyte_distill.data import tokenizers
from megabyte_distill.data.alignment import check_rebuild
from megabyte_distill.data.inputs import InputFormat, RawBatch
from megabyte_distill.data.token_bytes import TokenBytes
from megabyte_distill.data.tokenizers import DocumentTokenizer, TokenizerKind

BLANK_LINES = "blank lines"


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodeJob:
    """All a worker needs besides the text; small, hashable, sent with every batch."""

    json_keys: tuple[str, ...]
    tokenizer_model: str
    tokenizer_kind: TokenizerKind = TokenizerKind.AUTO
    tiktoken_pattern: str | None = None
    end_of_text: str | int | None = None
    bos: str | int | None = None


@functools.lru_cache(maxsize=1)
def tokenizer_of(job: EncodeJob) -> DocumentTokenizer:
    """The job's tokenizer, loaded once a process."""
    return tokenizers.load(
        job.tokenizer_model,
        kind=job.tokenizer_kind,
        pattern=job.tiktoken_pattern,
        end_of_text=job.end_of_text,
        bos=job.bos,
    )


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """How token ids of a vocabulary of W are stored."""
    return np.dtype(np.uint16 if vocab_size < 65536 else np.int32)


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedDocuments:
    """Items of one key, one after the other."""

    byte_ids: NDArray[np.uint8]
    """Each item BOS and the document's bytes."""
    byte_lengths: NDArray[np.int64]
    tokens: NDArray[Any]
    """Each item the start id and the document's tokens, in :func:`token_dtype`."""
    token_lengths: NDArray[np.int64]
    normalized: int
    """Documents that normalisation changed."""


@dataclass(frozen=True, slots=True)
class EncodedBatch:
    """A worker's answer."""

    by_key: tuple[EncodedDocuments, ...]
    skipped: Counter[str]


def encode_batch(job: EncodeJob, batch: RawBatch) -> EncodedBatch:
    """Encodes and verifies a batch. ValueError names file and line of the first record that is not as it should be."""
    tokenizer = tokenizer_of(job)
    skipped: Counter[str] = Counter()
    places: list[str] = []
    rows: list[tuple[str, ...]] = []
    for index, record in enumerate(batch.records):
        if batch.format is InputFormat.JSON_LINES and not record.strip():
            skipped[BLANK_LINES] += 1
            continue
        place = batch.where(index)
        texts = record_texts(record, batch.format, job.json_keys, place)
        places.append(place)
        rows.append(texts)
    columns = [[row[column] for row in rows] for column in range(len(job.json_keys))]
    return EncodedBatch(tuple(_encode(tokenizer, column, places) for column in columns), skipped)


def record_texts(record: bytes, kind: InputFormat, keys: Sequence[str], place: str) -> tuple[str, ...]:
    """A record's texts, one a key; ValueError begins with ``place``."""
    try:
        text = record.decode("utf-8")
    except UnicodeDecodeError as error:
        line = f", line {record.count(10, 0, error.start) + 1}" if kind is InputFormat.TEXT else ""
        raise ValueError(f"{place}{line}: invalid UTF-8 at byte {error.start} ({error.reason})") from error
    if kind is InputFormat.TEXT:
        return (text,)
    try:
        content = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{place}: invalid JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{place}: expected a JSON object, got {type(content).__name__}")
    for key in keys:
        if key not in content:
            raise ValueError(f"{place}: no key {key!r}; it has {', '.join(map(repr, content)) or 'none'}")
        value = content[key]
        if not isinstance(value, str):
            raise ValueError(f"{place}: {key!r} is {type(value).__name__}, expected text")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{place}: {key!r} has half a surrogate pair at character {error.start}") from error
    return tuple(content[key] for key in keys)


def _encode(tokenizer: DocumentTokenizer, texts: list[str], places: list[str]) -> EncodedDocuments:
    table = tokenizer.token_bytes
    documents = [tokenizer.normalize(text) for text in texts]
    raw = [document.encode() for document in documents]
    tokens = tokenizer.encode_batch(documents)
    _verify(raw, tokens, table, places)
    bos = bytes([BOS_BYTE])
    start = np.array([table.start_id], dtype=np.int32)
    return EncodedDocuments(
        byte_ids=np.frombuffer(bos + bos.join(raw) if raw else b"", dtype=np.uint8),
        byte_lengths=np.array([1 + len(document) for document in raw], dtype=np.int64),
        tokens=_joined([part for ids in tokens for part in (start, ids)]).astype(token_dtype(table.vocab_size)),
        token_lengths=np.array([1 + ids.size for ids in tokens], dtype=np.int64),
        normalized=sum(document != text for document, text in zip(documents, texts, strict=True)),
    )


def _joined(parts: Sequence[NDArray[np.int32]]) -> NDArray[np.int32]:
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)


def _verify(raw: list[bytes], tokens: list[NDArray[np.int32]], table: TokenBytes, places: list[str]) -> None:
    """All documents at once, which is what happens; one by one where something is wrong, to name it."""
    flat = _joined(tokens)
    if not flat.size or (int(flat.min()) >= 0 and int(flat.max()) < table.vocab_size):
        lengths = table.lengths[flat]
        ends = np.concatenate((np.zeros(1, dtype=np.int64), np.cumsum(lengths, dtype=np.int64)))
        cuts = np.cumsum([0, *(ids.size for ids in tokens)])
        same_sizes = np.array_equal(np.diff(ends[cuts]), [len(document) for document in raw])
        if same_sizes and lengths.all() and table.concatenate(flat).tobytes() == b"".join(raw):
            return
    for document, ids, place in zip(raw, tokens, places, strict=True):
        check_rebuild(ids, np.frombuffer(document, dtype=np.uint8), table, document=place)
