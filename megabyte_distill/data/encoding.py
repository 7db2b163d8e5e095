"""What one preprocessing worker does: raw records to verified bytes and tokens."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megabyte_distill.alphabet import BOS_BYTE
from megabyte_distill.data import tokenizers
from megabyte_distill.data.alignment import RebuildError, all_rebuild, check_rebuild
from megabyte_distill.data.arrow_text import is_utf8, json_items
from megabyte_distill.data.chat_template import ChatTemplate, MarkedText
from megabyte_distill.data.dialogues import dialogues_of
from megabyte_distill.data.loss_mask import spans_of
from megabyte_distill.data.readers import Payload, RawBatch, RecordKind
from megabyte_distill.data.records import InvalidRecordError, OnInvalid, texts_of
from megabyte_distill.data.skipped import ANSWER_JOINED, BLANK_LINES, NOT_REBUILT, Skipped
from megabyte_distill.data.token_bytes import TokenBytes
from megabyte_distill.data.tokenizers import DocumentTokenizer, EncodingError, TokenizerKind

_BOS = bytes([BOS_BYTE])
_NEWLINE, _CARRIAGE_RETURN = 10, 13


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodeJob:
    """All a worker needs besides the text; small, hashable, sent with every batch."""

    json_keys: tuple[str, ...] = ("text",)
    tokenizer_model: str = ""
    tokenizer_kind: TokenizerKind = TokenizerKind.AUTO
    tiktoken_pattern: str | None = None
    end_of_text: str | int | None = None
    bos: str | int | None = None
    append_eod: bool = False
    """End each token item with the end-of-text id."""
    on_invalid: OnInvalid = OnInvalid.ERROR
    strict: bool = False
    """A document that its tokens do not rebuild is an error instead of being left out."""
    chat_template: ChatTemplate | None = None
    """Records are dialogues, written by it; None: they are texts."""

    @property
    def has_tokens(self) -> bool:
        """False for a data set of bytes alone."""
        return self.tokenizer_kind is not TokenizerKind.NONE


_loaded: dict[EncodeJob, DocumentTokenizer] = {}
"""The job's tokenizer: loaded once, in the parent, and sent to the workers, which spares them the self-test."""


def load_tokenizer(job: EncodeJob) -> DocumentTokenizer:
    """Loads the job's tokenizer from its files, which may have changed since an earlier call."""
    tokenizer = tokenizers.load(
        job.tokenizer_model,
        kind=job.tokenizer_kind,
        pattern=job.tiktoken_pattern,
        end_of_text=job.end_of_text,
        bos=job.bos,
    )
    take_tokenizer(job, tokenizer)
    return tokenizer


def take_tokenizer(job: EncodeJob, tokenizer: DocumentTokenizer) -> None:
    """Use a tokenizer that another process has loaded."""
    _loaded.clear()
    _loaded[job] = tokenizer


def tokenizer_of(job: EncodeJob) -> DocumentTokenizer:
    """The job's tokenizer, from :func:`load_tokenizer` or :func:`take_tokenizer`."""
    return _loaded[job]


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
    """Each item the start id, the document's tokens and, where asked for, the end-of-text id, in :func:`token_dtype`;
    empty without tokenizer."""
    token_lengths: NDArray[np.int64]
    spans: NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, dtype=np.int32))
    """Of dialogues, each item the spans of loss_mask.py."""
    span_lengths: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    normalized: int = 0
    """Documents that normalisation changed."""
    skipped: Skipped = field(default_factory=Skipped)
    """Documents of this key alone that were left out."""


@dataclass(frozen=True, slots=True)
class EncodedBatch:
    """A worker's answer."""

    by_key: tuple[EncodedDocuments, ...]
    skipped: Skipped
    """Records that no key has."""


def encode_batch(job: EncodeJob, batch: RawBatch) -> EncodedBatch:
    """Encodes and verifies a batch. ValueError names file and line of the first record that is not as it should be."""
    if not job.has_tokens and (stored := _in_bulk(job, batch)) is not None:
        return stored
    skipped = Skipped()
    places: list[int] = []
    rows: list[tuple[str | MarkedText, ...]] = []
    for index, payload in enumerate(batch.payloads()):
        if batch.pieces and _is_blank(payload, batch.kind):  # type: ignore[arg-type]
            skipped.add(BLANK_LINES)
            continue
        try:
            rows.append(_documents_of(payload, batch, job))
        except InvalidRecordError as error:
            if job.on_invalid is OnInvalid.ERROR:
                raise ValueError(f"{batch.where(index)}: {error}") from error
            skipped.add(error.reason, batch.where(index))
            continue
        places.append(index)
    columns = [[row[column] for row in rows] for column in range(len(job.json_keys))]
    where = functools.partial(_place, batch, places)
    return EncodedBatch(tuple(_encode(job, column, where) for column in columns), skipped)


def _documents_of(payload: Payload, batch: RawBatch, job: EncodeJob) -> tuple[str | MarkedText, ...]:
    if job.chat_template is None:
        return texts_of(payload, batch, job.json_keys, job.on_invalid)
    assert isinstance(payload, bytes)  # of JSON: preprocessing refuses other formats
    normalize = tokenizer_of(job).normalize
    return dialogues_of(payload, job.json_keys, job.on_invalid, job.chat_template, normalize)


def _is_blank(line: bytes, kind: RecordKind) -> bool:
    """White space is nothing in JSON, and a document in plain text unless the line is empty (or but for its CR)."""
    return not (line.strip() if kind is RecordKind.JSON else line.removesuffix(b"\r"))


def _place(batch: RawBatch, places: list[int], index: int) -> str:
    return batch.where(places[index])


def _in_bulk(job: EncodeJob, batch: RawBatch) -> EncodedBatch | None:
    """A batch without tokens, where none of its records has to be looked at by itself; else None."""
    if batch.kind is RecordKind.JSON:
        columns = json_items(batch.lines(), job.json_keys, _BOS) if batch.pieces else None
        return None if columns is None else EncodedBatch(tuple(_without_tokens(*items) for items in columns), Skipped())
    if batch.kind is not RecordKind.TEXT:
        return None
    if batch.pieces:
        lines = batch.lines()
        return _text_lines(lines) if is_utf8(lines) else None
    documents: list[bytes] = list(batch.records)  # type: ignore[arg-type]
    return EncodedBatch((_only_bytes(documents),), Skipped()) if all(map(is_utf8, documents)) else None


def _text_lines(text: bytes) -> EncodedBatch:
    """A document a line, stored as it stands."""
    lines = np.frombuffer(text if text.endswith(b"\n") else text + b"\n", dtype=np.uint8)
    newlines = np.flatnonzero(lines == _NEWLINE)
    lengths = np.diff(newlines, prepend=-1)  # each line with its newline, whose place the BOS takes
    byte_ids = np.concatenate((lines[-1:], lines[:-1]))  # rotated by one: a newline is in front of what was behind it
    byte_ids[(newlines + 1) % lines.size] = BOS_BYTE
    blank = lengths == 1
    carriage = np.flatnonzero(lengths == 2)
    blank[carriage] = lines[newlines[carriage] - 1] == _CARRIAGE_RETURN
    skipped = Skipped()
    if blank.any():
        skipped.add(BLANK_LINES, count=int(blank.sum()))
        byte_ids, lengths = byte_ids[np.repeat(~blank, lengths)], lengths[~blank]
    return EncodedBatch((_without_tokens(byte_ids, lengths),), skipped)


def _joined_behind_bos(documents: Sequence[bytes]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Byte items and their lengths."""
    lengths = np.array([1 + len(document) for document in documents], dtype=np.int64)
    return np.frombuffer(_BOS.join([b"", *documents]), dtype=np.uint8), lengths


def _only_bytes(documents: Sequence[bytes]) -> EncodedDocuments:
    return _without_tokens(*_joined_behind_bos(documents))


def _without_tokens(byte_ids: NDArray[np.uint8], lengths: NDArray[np.int64]) -> EncodedDocuments:
    nothing = np.zeros(0, dtype=np.int64)
    return EncodedDocuments(byte_ids=byte_ids, byte_lengths=lengths, tokens=nothing, token_lengths=nothing)


def _encode(job: EncodeJob, given: list[str | MarkedText], where: functools.partial[str]) -> EncodedDocuments:
    texts = [document.text if isinstance(document, MarkedText) else document for document in given]
    if not job.has_tokens:
        return _only_bytes([text.encode() for text in texts])
    tokenizer = tokenizer_of(job)
    table = tokenizer.token_bytes
    documents = [tokenizer.normalize(text) for text in texts]
    changed = [document != text for document, text in zip(documents, texts, strict=True)]
    raw = [document.encode() for document in documents]
    try:
        tokens = tokenizer.encode_batch(documents)
    except EncodingError as error:
        raise ValueError(f"{where(error.index)}: {error}") from error
    skipped = Skipped()
    spans = _spans(given, documents, tokenizer.normalize)
    kept = list(range(len(raw)))
    if not all_rebuild([len(document) for document in raw], b"".join(raw), tokens, table):
        kept = _those_that_rebuild(raw, tokens, table, where, skipped, strict=job.strict)
    joined = {index for index in kept if spans and spans[index] is None}
    for index in sorted(joined):
        skipped.add(ANSWER_JOINED, where(index))
    kept = [index for index in kept if index not in joined]
    if len(kept) < len(raw):
        raw, tokens, changed = ([column[index] for index in kept] for column in (raw, tokens, changed))  # type: ignore[assignment]
    kept_spans = [found for index in kept if spans and (found := spans[index]) is not None]
    flat, lengths = _with_events(tokens, table, append_eod=job.append_eod)
    byte_ids, byte_lengths = _joined_behind_bos(raw)
    return EncodedDocuments(
        byte_ids=byte_ids,
        byte_lengths=byte_lengths,
        tokens=flat,
        token_lengths=lengths,
        spans=_joined(kept_spans),
        span_lengths=np.array([of_document.size for of_document in kept_spans], dtype=np.int64),
        normalized=sum(changed),
        skipped=skipped,
    )


def _spans(
    given: Sequence[str | MarkedText], documents: Sequence[str], normalize: Callable[[str], str]
) -> list[NDArray[np.int32] | None]:
    """Of each dialogue, None where it has none; empty for texts."""
    pairs = zip(given, documents, strict=True)
    return [spans_of(marked, document, normalize) for marked, document in pairs if isinstance(marked, MarkedText)]


def _joined(parts: Sequence[NDArray[np.int32]]) -> NDArray[np.int32]:
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)


def _with_events(
    tokens: Sequence[NDArray[np.int32]], table: TokenBytes, *, append_eod: bool
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """All items one after the other, each with the start id and perhaps the end-of-text id, and their lengths."""
    lengths = np.array([ids.size for ids in tokens], dtype=np.int64) + 1 + int(append_eod)
    ends = np.cumsum(lengths)
    flat = np.empty(int(ends[-1]) if ends.size else 0, dtype=token_dtype(table.vocab_size))
    is_text = np.ones(flat.size, dtype=np.bool_)
    starts = ends - lengths
    flat[starts], is_text[starts] = table.start_id, False
    if append_eod:
        flat[ends - 1], is_text[ends - 1] = table.end_of_text_id, False
    flat[is_text] = _joined(tokens)
    return flat, lengths


def _those_that_rebuild(
    raw: list[bytes],
    tokens: list[NDArray[np.int32]],
    table: TokenBytes,
    where: functools.partial[str],
    skipped: Skipped,
    *,
    strict: bool,
) -> list[int]:
    """Indices of the documents that can be rebuilt; the others are named in ``skipped``, or are an error."""
    kept = []
    for index, (document, ids) in enumerate(zip(raw, tokens, strict=True)):
        try:
            check_rebuild(ids, np.frombuffer(document, dtype=np.uint8), table, document=where(index))
        except RebuildError as error:
            if strict:
                raise
            skipped.add(NOT_REBUILT, f"{where(index)}, byte {error.offset}")
            continue
        kept.append(index)
    return kept
