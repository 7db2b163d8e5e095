from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megabyte_distill.data.token_bytes import TokenBytes

TOKENS = [None, b"a", b"ab", "é".encode(), b"a", b"\x00", None, b"ab"]


def _table(tokens: list[bytes | None] = TOKENS, bos_id: int | None = None) -> TokenBytes:
    return TokenBytes.from_list(tokens, end_of_text_id=0, bos_id=bos_id)


def test_every_id_gives_its_bytes() -> None:
    table = _table()
    assert [table[i] or None for i in range(table.vocab_size)] == TOKENS
    assert table.lengths.tolist() == [0, 1, 2, 2, 1, 1, 0, 2]
    assert table.special.tolist() == [True, False, False, False, False, False, True, False]
    assert table.duplicates == ((1, 4), (2, 7))


def test_concatenation_joins_bytes_in_order() -> None:
    table = _table()
    ids = np.array([2, 0, 3, 5, 1, 6])
    assert table.concatenate(ids).tobytes() == b"ab\xc3\xa9\x00a"
    assert table.concatenate(np.zeros(0, dtype=np.int64)).size == 0


def test_start_id_is_bos_or_else_end_of_text() -> None:
    assert _table().start_id == 0 and _table(bos_id=6).start_id == 6


def test_events_are_never_text() -> None:
    table = TokenBytes.from_list([b"<end>", b"a"], end_of_text_id=0, bos_id=None)
    assert table.lengths.tolist() == [0, 1]


def test_an_empty_token_is_an_error() -> None:
    with pytest.raises(ValueError, match="id 1 stands for zero bytes"):
        _table([None, b""])


def test_ids_outside_the_vocabulary_are_an_error() -> None:
    with pytest.raises(ValueError, match="BOS id 8"):
        _table(bos_id=8)


def test_hash_is_about_meaning_not_padding() -> None:
    assert _table().hash == _table([*TOKENS, None, None]).hash == _table().padded(100).hash
    assert _table().padded(100).vocab_size == 100
    different = [_table([*TOKENS[:-1], b"ac"]), _table(bos_id=6), _table([None, b"aa", b"b", *TOKENS[3:]])]
    assert len({table.hash for table in [_table(), *different]}) == 4
    with pytest.raises(ValueError, match="only 3"):
        _table().padded(3)


@pytest.mark.parametrize("bos_id", [None, 6])
def test_saved_and_loaded_is_the_same(tmp_path: Path, bos_id: int | None) -> None:
    table = _table(bos_id=bos_id)
    table.save(tmp_path / "t.npz")
    loaded = TokenBytes.load(tmp_path / "t.npz")
    assert loaded.hash == table.hash and loaded.bos_id == bos_id and loaded.vocab_size == table.vocab_size
    assert [path.name for path in tmp_path.iterdir()] == ["t.npz"]


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "t.npz"
    with pytest.raises(ValueError, match=r"t\.npz"):
        TokenBytes.load(path)
    _table().save(path)
    content = path.read_bytes()
    for broken in (content[: len(content) // 2], b"", b"\x80\x04K\x01."):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"t\.npz"):
            TokenBytes.load(path)
