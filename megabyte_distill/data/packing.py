"""The packed row: what one micro-batch is, and the pure function that builds it from pieces of documents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megabyte_distill.alphabet import BOS_BYTE, END_OF_DOCUMENT_CLASS, PAD_BYTE, joint_class
from megabyte_distill.data.stored_targets import StoredTargets


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedRow:
    """P bytes of one or more segments, their M gold chunks, and the labels of both. P and M count everything.

    A segment is BOS and a run of whole tokens of one document. Unused bytes at the end are one dummy segment of PAD,
    one chunk. Chunks behind the last byte's, up to the bucket, are one dummy segment of chunks only.
    """

    byte_ids: Tensor
    """[P] int64."""
    bits: Tensor
    """[P] bool, gold: the byte ends a chunk, a teacher token or several. True on BOS and on the first PAD byte."""
    labels: Tensor
    """[P] int64 joint class of the next byte and its bit, also across a cut; 0 on PAD."""
    is_real: Tensor
    """[P] bool, False on PAD: positions that predict something."""
    tokens: Tensor
    """[M] int64 teacher token that ends with the chunk, the teacher's start id on BOS chunks; 0 on padding."""
    token_labels: Tensor
    """[M] int64 next teacher token, also across a cut; the end-of-text id at a document's end; 0 on padding."""
    token_mask: Tensor
    """[M] bool, True on real chunks."""
    token_ends_document: Tensor
    """[M] bool, True where the label is the event "the document ends" (left out of bits per byte)."""
    cu_seqlens: Tensor
    """[S + 1] int32 byte offsets of segments, the PAD tail included; from 0 to P."""
    cu_chunks: Tensor
    """[S' + 1] int32 chunk offsets of segments, the padding of the bucket included; from 0 to M."""
    chunk_bucket: int
    """M is a multiple of it."""
    documents: tuple[int, ...]
    """Index in its data set of each real segment's document; -1 where unknown."""
    stored: StoredTargets | None = None
    """The bytes' exact targets, where they are read from a cache."""
    token_bits: Tensor | None = None
    """[P] bool ends of the teacher's tokens where ``bits`` are fewer (chunk_merging.py); None where they are these."""
    forced_ends: Tensor | None = None
    """[P] bool of such a row: ends of chunks that its rule would have merged, had the segment gone on."""
    marked: Tensor | None = None
    """[P] bool positions that the data's loss mask marks (the byte they predict is an answer's), where a stage reads
    it; None where all text is trained."""

    @property
    def token_ends(self) -> Tensor:
        """[P] bool: the byte ends a teacher token, one for each of the M chunks of tokens that are no padding."""
        return self.bits if self.token_bits is None else self.token_bits

    @property
    def trained(self) -> Tensor:
        """[P] bool: positions whose prediction is trained and measured."""
        return self.is_real if self.marked is None else self.marked

    def to(self, device: torch.device | str) -> PackedRow:
        """The same row with every tensor on ``device``."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}
        stored = None if self.stored is None else self.stored.to(device)
        return replace(self, **{name: value.to(device) for name, value in tensors.items()}, stored=stored)


def without_document_mask(row: PackedRow) -> PackedRow:
    """The same row with all its text as one segment (the paper's way): documents in it see each other.

    PAD and the padding of the bucket stay apart. Do it row by row, before rows are joined to a micro-batch.
    """
    used, chunks = int(row.is_real.sum()), int(row.token_mask.sum())
    size, capacity = row.byte_ids.shape[0], row.tokens.shape[0]
    nothing = np.zeros(1, dtype=np.int64)
    return replace(
        row,
        cu_seqlens=_offsets(nothing, used, size),
        cu_chunks=_offsets(nothing, chunks, chunks + int(used < size), capacity),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """A run of whole tokens of one document, without BOS; empty for an empty document."""

    document: int
    byte_ids: NDArray[np.uint8]
    """The tokens' bytes."""
    tokens: NDArray[Any]
    token_lengths: NDArray[Any]
    """Bytes of each token, all positive."""
    next_byte: int | None
    """First byte behind the run; None where the document ends there."""
    next_token: int | None
    """First token behind the run; None where the document ends there."""
    next_token_length: int | None
    """Bytes of ``next_token``."""
    marked: NDArray[np.bool_] | None = None
    """Whether each byte, and behind them what follows the run, is trained; None without a loss mask."""


def pack_row(
    segments: Sequence[Segment], *, row_bytes: int, chunk_bucket: int, start_id: int, end_of_text_id: int
) -> PackedRow:
    """One row of ``row_bytes`` bytes, P; M is the least multiple of ``chunk_bucket`` that holds the chunks.

    ``start_id`` is the teacher's token at BOS. ValueError where the segments do not fit or there is none.
    """
    sizes = np.array([1 + segment.byte_ids.size for segment in segments], dtype=np.int64)
    used = int(sizes.sum())
    if not segments or used > row_bytes:
        raise ValueError(f"{len(segments)} segments of {used} bytes with BOS do not make a row of {row_bytes} bytes")
    ends = np.cumsum(sizes)
    starts = ends - sizes

    byte_ids = np.full(row_bytes, PAD_BYTE, dtype=np.int64)
    byte_ids[:used] = _behind(BOS_BYTE, [segment.byte_ids for segment in segments])
    bits = np.zeros(row_bytes, dtype=np.bool_)
    bits[np.cumsum(_behind(1, [segment.token_lengths for segment in segments])) - 1] = True
    labels = torch.zeros(row_bytes, dtype=torch.int64)
    labels[: used - 1] = joint_class(torch.from_numpy(byte_ids[1:used]), torch.from_numpy(bits[1:used]).long())
    labels[torch.from_numpy(ends - 1)] = torch.tensor([_label_after(segment) for segment in segments])
    if used < row_bytes:
        bits[used] = True

    real_chunks = int(np.count_nonzero(bits[:used]))
    chunks = real_chunks + int(used < row_bytes)
    capacity = -(-chunks // chunk_bucket) * chunk_bucket
    chunk_sizes = np.array([1 + segment.tokens.size for segment in segments], dtype=np.int64)
    chunk_ends = np.cumsum(chunk_sizes)
    tokens = np.zeros(capacity, dtype=np.int64)
    tokens[:real_chunks] = _behind(start_id, [segment.tokens for segment in segments])
    token_labels = np.zeros(capacity, dtype=np.int64)
    token_labels[: real_chunks - 1] = tokens[1:real_chunks]
    token_labels[chunk_ends - 1] = [end_of_text_id if s.next_token is None else s.next_token for s in segments]
    token_ends_document = np.zeros(capacity, dtype=np.bool_)
    token_ends_document[chunk_ends - 1] = [segment.next_token is None for segment in segments]

    return PackedRow(
        byte_ids=torch.from_numpy(byte_ids),
        bits=torch.from_numpy(bits),
        labels=labels,
        is_real=torch.from_numpy(np.arange(row_bytes) < used),
        tokens=torch.from_numpy(tokens),
        token_labels=torch.from_numpy(token_labels),
        token_mask=torch.from_numpy(np.arange(capacity) < real_chunks),
        token_ends_document=torch.from_numpy(token_ends_document),
        cu_seqlens=_offsets(starts, used, row_bytes),
        cu_chunks=_offsets(chunk_ends - chunk_sizes, real_chunks, chunks, capacity),
        chunk_bucket=chunk_bucket,
        documents=tuple(segment.document for segment in segments),
        marked=_marked(segments, row_bytes),
    )


def _marked(segments: Sequence[Segment], row_bytes: int) -> Tensor | None:
    """A position is marked where what it predicts is: BOS predicts a segment's first byte."""
    parts = [segment.marked for segment in segments if segment.marked is not None]
    if not parts:
        return None
    assert len(parts) == len(segments), "some segments have a loss mask, others none"
    marked = np.zeros(row_bytes, dtype=np.bool_)
    found = np.concatenate(parts)
    marked[: found.size] = found
    return torch.from_numpy(marked)


def _behind(first: int, parts: Sequence[NDArray[Any]]) -> NDArray[np.int64]:
    """All parts one after the other, each behind the number ``first``."""
    head = np.array([first], dtype=np.int64)
    return np.concatenate([piece for part in parts for piece in (head, part)]).astype(np.int64, copy=False)


def _label_after(segment: Segment) -> int:
    """Joint class of what follows a segment's last byte in its document."""
    if segment.next_byte is None:
        return END_OF_DOCUMENT_CLASS
    return joint_class(segment.next_byte, int(segment.next_token_length == 1))


def _offsets(starts: NDArray[np.int64], *ends: int) -> Tensor:
    """int32 offsets: the segments' starts, then ascending ends without repetition (an empty dummy segment is none)."""
    return torch.from_numpy(np.concatenate((starts, sorted(set(ends)))).astype(np.int32))
