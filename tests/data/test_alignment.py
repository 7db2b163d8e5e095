from __future__ import annotations

import pickle

import numpy as np
import pytest

from megabyte_distill.data.alignment import RebuildError, boundary_bits, check_rebuild
from megabyte_distill.data.token_bytes import TokenBytes
from megabyte_distill.data.tokenizers import DocumentTokenizer

TABLE = TokenBytes.from_list([None, b"a", b"ab", b"abc"], end_of_text_id=0, bos_id=None)


def _array(text: bytes) -> np.ndarray:
    return np.frombuffer(text, dtype=np.uint8)


def test_bits_mark_last_bytes() -> None:
    assert boundary_bits(np.array([2, 1, 3]), TABLE).tolist() == [False, True, True, False, False, True]
    assert boundary_bits(np.zeros(0, dtype=np.int64), TABLE).size == 0


def test_bits_equal_the_slow_definition(tokenizer: DocumentTokenizer, texts: list[str]) -> None:
    table = tokenizer.token_bytes
    documents = [tokenizer.normalize(text) for text in texts]
    for document, tokens in zip(documents, tokenizer.encode_batch(documents), strict=True):
        slow: list[bool] = []
        for token in tokens.tolist():
            slow += [False] * (len(table[token]) - 1) + [True]
        bits = boundary_bits(tokens, table)
        assert bits.tolist() == slow and bits.size == len(document.encode())
        assert bits.sum() == tokens.size


def test_a_special_token_is_no_text() -> None:
    with pytest.raises(ValueError, match=r"token 1 \(id 0\) is special"):
        boundary_bits(np.array([1, 0]), TABLE)
    with pytest.raises(RebuildError, match="special or unknown"):
        check_rebuild(np.array([1, 0]), _array(b"a"), TABLE, document=0)


@pytest.mark.parametrize(
    ("tokens", "document", "offset"),
    [
        ([2, 1], b"aba", None),
        ([2, 1], b"abb", 2),
        ([2, 1], b"abab", 3),
        ([2, 1], b"ab", 2),
        ([], b"a", 0),
        ([9], b"", 0),
    ],
)
def test_the_first_differing_byte_is_named(tokens: list[int], document: bytes, offset: int | None) -> None:
    ids = np.array(tokens, dtype=np.int64)
    if offset is None:
        check_rebuild(ids, _array(document), TABLE, document=7)
        return
    with pytest.raises(RebuildError, match="document 7: ") as error:
        check_rebuild(ids, _array(document), TABLE, document=7)
    assert (error.value.offset, error.value.document) == (offset, 7) and f"byte {offset}" in str(error.value)
    copy = pickle.loads(pickle.dumps(error.value))
    assert (str(copy), copy.offset, copy.document) == (str(error.value), offset, 7)
