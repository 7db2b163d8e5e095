"""What the exact targets read and write for a byte does not grow with the vocabulary; for a token it does."""

from __future__ import annotations

import string

import pytest
import torch

from benchmarks.exact_targets import TARGETS, Parts, Roofline
from megabyte_distill.alphabet import BOS_BYTE, joint_class
from megabyte_distill.data.token_bytes import TokenBytes
from megabyte_distill.objectives import exact_targets as module
from megabyte_distill.objectives.byte_tree import ByteTree
from megabyte_distill.objectives.exact_targets import exact_targets

SHORT, LONG = b"ab", b"abcdefghij"
SIZES = (20_000, 80_000)
"""Both above the size from which tokens are added up in spans."""


def vocabulary(size: int) -> TokenBytes:
    """The same tokens where the text's prefixes are; all that is more stands behind "zz", where the text never is."""
    letters = string.ascii_lowercase.encode()
    near = [bytes([letter]) for letter in letters]
    near += [LONG[:end] + bytes([letter]) for end in range(1, len(LONG)) for letter in letters]
    more = [b"zz" + str(number).encode() for number in range(size)]
    pieces = [*near, *more][: size - 1]
    return TokenBytes.from_list([*pieces, None], end_of_text_id=size - 1, bos_id=None)


def touched(size: int, token: bytes, count: int) -> float:
    """Bytes of memory that the targets of ``count`` times a token read and write."""
    tree = ByteTree.of(vocabulary(size))
    byte_ids = torch.tensor([BOS_BYTE, *token * count])
    bits = torch.zeros(byte_ids.shape[0], dtype=torch.bool)
    bits[:: len(token)] = True
    labels = joint_class(byte_ids, bits.to(torch.int64)).roll(-1)
    logits = torch.zeros(count + 1, size)
    parts = Parts()
    with parts.inside(TARGETS), Roofline(parts, 1.0, 1.0) as counted:
        exact_targets(tree, logits, byte_ids=byte_ids, bits=bits, labels=labels, wanted=bits | True)
    return counted.bytes[TARGETS]


@pytest.mark.parametrize("count", [4, 12])
def test_work_is_w_for_a_token_and_the_same_for_a_byte(count: int) -> None:
    assert min(SIZES) > module._SINGLES_UP_TO
    of_bytes, of_tokens = [], []
    for size in SIZES:
        short, long = (touched(size, token, count) for token in (SHORT, LONG))
        of_bytes.append((long - short) / (count * (len(LONG) - len(SHORT))))
        of_tokens.append(short / (count + 1))
    assert of_bytes[0] == pytest.approx(of_bytes[1], rel=1e-3) and of_bytes[0] > 0
    assert of_tokens[1] > 0.8 * SIZES[1] / SIZES[0] * of_tokens[0]  # two bytes of each token are in it
    assert of_bytes[0] < 0.2 * of_tokens[0]
