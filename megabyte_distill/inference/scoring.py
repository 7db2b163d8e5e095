"""The one definition of a text's score: minus log of the summed probability of its segmentations.

All figures are upper bounds on the model's negative log-likelihood of the bytes: one pass under given bits counts one
segmentation, K paths count up to K. Bits that are input are the same bits that are label, so nothing looks ahead.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megabyte_distill.alphabet import BYTE_VOCAB, END_OF_DOCUMENT_CLASS, joint_class
from megabyte_distill.data.packing import PackedRow
from megabyte_distill.data.progress import UNCOUNTED, Counter
from megabyte_distill.data.text_mask import document_end_positions, text_chunks, text_positions
from megabyte_distill.inference.bit_paths import BitPaths, device_of
from megabyte_distill.kernels.ops import joint_cross_entropy
from megabyte_distill.model.backbone import Backbone
from megabyte_distill.model.student import Boundaries, Gold, RouterDecides, Student

_LOGIT_ROWS = 1024
"""Positions whose token logits are held at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowScore:
    """What a model makes of a packed row's text, by real segment: a document, or a part of one."""

    bits: Tensor
    """[S] fp64, code length of each segment's text."""
    bytes: Tensor
    """[S] int64, each segment's text (without BOS)."""
    end_bits: float
    """Code length of the events "the document ends", which are no part of ``bits``."""
    ends: int
    """Number of those events."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PathScore:
    """What K paths make of N texts, in bits; fp64 [N] each."""

    bits: Tensor
    """Summed probability of the paths that survived: an upper bound of the model's code length."""
    filter_bits: Tensor
    """Code length under the causal byte filter, a byte model of its own that forgets what was pruned."""
    end_bits: Tensor
    """Of the event "the document ends" behind the text, under the filter."""


def labels_under(bits: Tensor, row: PackedRow) -> Tensor:
    """Joint labels [P] int64 of a row whose boundaries are ``bits`` [P] bool instead of the gold ones.

    A segment's last label stays the row's own: the byte behind a cut is not in the row, its bit is nobody's choice.
    """
    following = joint_class(row.byte_ids.roll(-1), bits.roll(-1).to(torch.int64))
    return torch.where(text_positions(row), following, row.labels)


def joint_nll(logits: Tensor, bits: Tensor, row: PackedRow) -> Tensor:
    """−log P(x_{t+1}, b_{t+1}) [P] in nats, fp32, of logits [P, 512] computed under ``bits`` [P]; undefined on PAD."""
    return joint_cross_entropy(logits, labels_under(bits, row))


def joint_row_score(nll: Tensor, row: PackedRow) -> RowScore:
    """Accounts for :func:`joint_nll` by segment."""
    ends = document_end_positions(row)
    return RowScore(
        bits=_by_segment(nll, text_positions(row), row.is_real, row.cu_seqlens),
        bytes=_text_bytes(row),
        end_bits=float(nll[ends].double().sum()) / math.log(2),
        ends=int(ends.sum()),
    )


@torch.no_grad()
def score_row(student: Student, row: PackedRow, boundaries: Boundaries | None = None) -> RowScore:
    """Joint score in one pass under gold (default), the router's, or given bits.

    In official mode the logits have seen the next byte: the figure is the paper's, and no bound.
    """
    outputs = student(row, boundaries or Gold())
    return joint_row_score(joint_nll(outputs.logits, outputs.bits, row), row)


@torch.no_grad()
def score_official(student: Student, row: PackedRow, threshold: float = 0.5) -> RowScore:
    """The paper's score: the likelier of a byte's two bits, boundaries by the router from the whole string.

    No bound: a router's bit at t is decided with x_{t+1} in sight and tells about it, and a byte is credited with the
    label's bit that fits best although the other one is input. Kept for comparison with published figures.
    """
    logits = student(row, RouterDecides(threshold)).logits
    pairs = logits.float().log_softmax(-1).view(-1, 2, BYTE_VOCAB)
    wanted = (row.labels % BYTE_VOCAB)[:, None, None].expand(-1, 2, 1)
    return joint_row_score(-pairs.gather(2, wanted)[..., 0].amax(1), row)


@torch.no_grad()
def token_nll(backbone: Backbone, hidden: Tensor, labels: Tensor) -> Tensor:
    """−log P(token) [M] in nats, fp32, of labels [M] under the token head on states [M, E]; few logits at a time."""
    parts = [
        torch.nn.functional.cross_entropy(backbone.logits(h).float(), label, reduction="none")
        for h, label in zip(torch.split(hidden, _LOGIT_ROWS), torch.split(labels, _LOGIT_ROWS), strict=True)
    ]
    return torch.cat(parts)


def token_row_score(nll: Tensor, row: PackedRow) -> RowScore:
    """Accounts for the NLL [M] of the row's gold tokens by segment, in the same bytes as :func:`joint_row_score`."""
    ends = row.token_mask & row.token_ends_document
    return RowScore(
        bits=_by_segment(nll, text_chunks(row), row.token_mask, row.cu_chunks),
        bytes=_text_bytes(row),
        end_bits=float(nll[ends].double().sum()) / math.log(2),
        ends=int(ends.sum()),
    )


@torch.no_grad()
def score_tokens(backbone: Backbone, row: PackedRow, vectors: Tensor | None = None) -> RowScore:
    """A token model's score of its canonical tokens; ``vectors`` [M, E] stand in for their embeddings where given."""
    embedded = backbone.embed(row.tokens) if vectors is None else vectors
    return token_row_score(token_nll(backbone, backbone(embedded, row.cu_chunks), row.token_labels), row)


def segment_texts(row: PackedRow) -> list[Tensor]:
    """The bytes [L] int64 of each real segment, without BOS."""
    edges = row.cu_seqlens.tolist()
    real = row.is_real[row.cu_seqlens[:-1].to(torch.int64)].tolist()
    return [
        row.byte_ids[first + 1 : last] for first, last, is_real in zip(edges, edges[1:], real, strict=False) if is_real
    ]


@torch.no_grad()
def score_paths(
    student: Student, texts: Sequence[Tensor], *, paths: int = 4, batch: int = 32, done: Counter = UNCOUNTED
) -> PathScore:
    """Scores texts, each the bytes [L] int64 behind one BOS, without a tokenizer; ``batch`` texts run side by side.

    ``done`` is told of every byte.

    The sum runs over the bits of all bytes, the last one's included. With ``paths`` ≥ 2^L nothing is pruned and the
    figure is exact. ValueError in official mode, which cannot step.
    """
    device = device_of(student)
    result = torch.zeros(3, len(texts), dtype=torch.float64, device=device)
    order = sorted(range(len(texts)), key=lambda index: -texts[index].shape[0])
    for first in range(0, len(order), batch):
        members = order[first : first + batch]
        result[:, members] = _score_batch(student, [texts[index].to(device) for index in members], paths, done)
    bits, filter_bits, end_bits = result / math.log(2)
    return PathScore(bits=bits, filter_bits=filter_bits, end_bits=end_bits)


def _score_batch(student: Student, texts: list[Tensor], paths: int, done: Counter) -> Tensor:
    """[3, R] nats of texts in order of falling length, so that those still running stand in front."""
    lengths = [text.shape[0] for text in texts]
    padded = torch.nn.utils.rnn.pad_sequence(texts)
    running = BitPaths(student, len(texts), paths)
    result = torch.zeros(3, len(texts), dtype=torch.float64, device=padded.device)
    for position in range(lengths[0] + 1):
        count = sum(length > position for length in lengths)
        if count < running.rows:
            result[0, count : running.rows] = -running.log_probability()[count:]
            result[2, count : running.rows] = -running.next_log_probabilities()[count:, END_OF_DOCUMENT_CLASS]
            if not count:
                break
            running.keep(torch.arange(count, device=padded.device))
        byte_ids = padded[position, :count]
        result[1, :count] -= running.log_probability_of(byte_ids)
        running.advance(byte_ids)
        done.advance(count)
    return result


def _text_bytes(row: PackedRow) -> Tensor:
    lengths = (row.cu_seqlens[1:] - row.cu_seqlens[:-1] - 1).to(torch.int64)
    return lengths[row.is_real[row.cu_seqlens[:-1].to(torch.int64)]]


def _by_segment(nll: Tensor, text: Tensor, real: Tensor, cu_seqlens: Tensor) -> Tensor:
    """[S] bits: the values [N] at ``text`` [N], summed over each segment whose first element is ``real`` [N]."""
    edges = cu_seqlens.to(torch.int64)
    # where, not a product: nll may be anything off the text
    total = torch.nn.functional.pad(torch.where(text, nll.double(), 0.0).cumsum(0), (1, 0)) / math.log(2)
    return (total[edges[1:]] - total[edges[:-1]])[real[edges[:-1]]]
