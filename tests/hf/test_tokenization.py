"""Bytes in, bytes out: markers in text stay text, and no special id decodes to nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megabyte_distill.alphabet import BOS_BYTE, PAD_BYTE
from megabyte_distill.hf.tokenization_megabyte import BOS_MARKER, PAD_MARKER, MegabyteTokenizer

TOKENIZER = MegabyteTokenizer()


@given(st.text())
def test_ids_are_the_utf8_bytes_behind_bos(text: str) -> None:
    ids = TOKENIZER(text)["input_ids"]
    assert ids == [BOS_BYTE, *text.encode()]
    assert TOKENIZER(text, add_special_tokens=False)["input_ids"] == list(text.encode())
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == text
    assert TOKENIZER.decode(ids) == BOS_MARKER + text


@pytest.mark.parametrize("marker", [BOS_MARKER, PAD_MARKER])
def test_a_marker_in_a_text_is_text(marker: str) -> None:
    text = f"a {marker} b{marker}"
    for options in ({}, {"split_special_tokens": False}):
        assert TOKENIZER(text, **options)["input_ids"] == [BOS_BYTE, *text.encode()]
    assert TOKENIZER.decode([*text.encode()], skip_special_tokens=True) == text


def test_special_ids_decode_to_something_and_broken_utf8_is_replaced() -> None:
    assert TOKENIZER.decode(BOS_BYTE) == TOKENIZER.decode([BOS_BYTE]) == BOS_MARKER
    assert TOKENIZER.decode([PAD_BYTE]) == PAD_MARKER
    assert TOKENIZER.bos_token_id == TOKENIZER.eos_token_id == BOS_BYTE and TOKENIZER.pad_token_id == PAD_BYTE
    assert TOKENIZER.decode([0xE7, 0x8C, 0x61]) == "�a"
    assert len(TOKENIZER) == len(TOKENIZER.get_vocab()) == 256
    with pytest.raises(ValueError, match="id 256 is no byte"):
        TOKENIZER.decode([256])
    with pytest.raises(ValueError, match="half of a surrogate"):
        TOKENIZER("\ud800")


@pytest.mark.parametrize("side", ["left", "right"])
def test_batches_are_padded_on_either_side(side: str) -> None:
    batch = TOKENIZER(["abc", "", "é"], padding=True, padding_side=side, return_tensors="pt")
    assert set(batch) == {"input_ids", "attention_mask"}
    assert batch["attention_mask"].sum(-1).tolist() == [4, 1, 3]
    assert ((batch["input_ids"] == PAD_BYTE) == (batch["attention_mask"] == 0)).all()
    assert bool(batch["attention_mask"][1, 0]) is (side == "right")
    assert TOKENIZER.batch_decode(batch["input_ids"], skip_special_tokens=True) == ["abc", "", "é"]


def test_truncation_and_pairs() -> None:
    assert TOKENIZER("abcdef", truncation=True, max_length=3)["input_ids"] == [BOS_BYTE, 97, 98]
    assert TOKENIZER("a", "b")["input_ids"] == [BOS_BYTE, 97, 98]
    assert TOKENIZER("a", return_special_tokens_mask=True)["special_tokens_mask"] == [1, 0]
    assert TOKENIZER.get_special_tokens_mask([BOS_BYTE, 97, PAD_BYTE], already_has_special_tokens=True) == [1, 0, 1]


def test_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    MegabyteTokenizer(padding_side="left", model_max_length=99).save_pretrained(tmp_path)
    again = MegabyteTokenizer.from_pretrained(tmp_path)
    assert again("ab")["input_ids"] == [BOS_BYTE, 97, 98]
    assert again.padding_side == "left" and again.model_max_length == 99
    assert again.decode(BOS_BYTE) == BOS_MARKER and again(BOS_MARKER)["input_ids"] == [BOS_BYTE, *BOS_MARKER.encode()]
    assert MegabyteTokenizer.from_pretrained(tmp_path, add_bos_token=False)("ab")["input_ids"] == [97, 98]
