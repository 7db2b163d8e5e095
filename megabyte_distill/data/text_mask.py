"""The one bits-per-byte accounting: which predictions of a packed row count as text, each byte of text exactly once.

A segment's last prediction does not count: at a document's end it is the event "the document ends" (left out for
teacher and student alike, reported apart), at a cut it is repeated by the next segment, which starts with BOS again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megabyte_distill.alphabet import END_OF_DOCUMENT_CLASS
from megabyte_distill.data.packing import PackedRow


def not_last(cu_seqlens: Tensor, length: int) -> Tensor:
    """[length] bool, False on the last element of each segment."""
    mask = torch.ones(length, dtype=torch.bool, device=cu_seqlens.device)
    mask[cu_seqlens[1:].long() - 1] = False
    return mask


def text_positions(row: PackedRow) -> Tensor:
    """[P] bool: positions whose label is a byte of text, under a loss mask a marked one.

    Their number is the row's text in bytes.
    """
    is_byte = row.trained & (row.labels != END_OF_DOCUMENT_CLASS)
    return is_byte & not_last(row.cu_seqlens, row.byte_ids.shape[0])


def text_chunks(row: PackedRow) -> Tensor:
    """[M] bool: gold chunks whose label is a token of text; the tokens spell the bytes of :func:`text_positions`."""
    is_token = row.token_mask & ~row.token_ends_document
    return is_token & not_last(row.cu_chunks, row.tokens.shape[0])


def document_end_positions(row: PackedRow) -> Tensor:
    """[P] bool: positions whose label is the event "the document ends"."""
    return row.is_real & (row.labels == END_OF_DOCUMENT_CLASS)
