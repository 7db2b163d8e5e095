"""The byte alphabet and the joint (byte, boundary bit) classes: the one place that knows 256 and 512.

A document is its UTF-8 bytes behind one ``BOS_BYTE``. Neither ``BOS_BYTE`` nor ``PAD_BYTE`` occurs in UTF-8.
Joint class = byte + 256 · bit, where the bit says whether that byte ends a chunk (a teacher token).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch

BYTE_VOCAB = 256
"""Number of byte values, V."""
JOINT_CLASSES = 2 * BYTE_VOCAB
"""Number of (byte, bit) pairs the model's head distinguishes."""
BOS_BYTE = 0xFE
"""Stands in front of every document (and of every continued segment); also means "the document ends" as a label."""
PAD_BYTE = 0xFF
"""Fills a packed row's unused end; never an input of a real position, never a label."""
END_OF_DOCUMENT_CLASS = BOS_BYTE + BYTE_VOCAB
"""Label after a document's last byte: BOS, which is a chunk of its own (bit 1)."""

_ByteLike = TypeVar("_ByteLike", int, "torch.Tensor")


def joint_class(byte: _ByteLike, bit: _ByteLike) -> _ByteLike:
    """Class in [0, 512) of a byte and its boundary bit (0 or 1); ints or integer tensors of one shape."""
    return byte + BYTE_VOCAB * bit


def split_class(joint: _ByteLike) -> tuple[_ByteLike, _ByteLike]:
    """The (byte, bit) of a joint class; inverse of :func:`joint_class`."""
    return joint % BYTE_VOCAB, joint // BYTE_VOCAB
