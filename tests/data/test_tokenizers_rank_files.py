"""Published rank files load without options and give the ids of their tokenizer.json."""

from __future__ import annotations

import base64
import dataclasses
import json
import os
import pickle
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from megabyte_distill.data import tokenizer_rank_files, tokenizer_tiktoken, tokenizers
from megabyte_distill.data.tokenizer_rank_files import KNOWN_RANK_FILES, QWEN_PATTERN, RankFile, digest_of
from megabyte_distill.data.tokenizer_ranks import byte_level_alphabet
from megabyte_distill.data.tokenizers import DocumentTokenizer

QWEN_FOLDER = "MEGABYTE_DISTILL_QWEN_FOLDER"
PIECES = [bytes([byte]) for byte in range(256)]
PIECES += [b"th", b"the", b" the", b"12", b"\xcc\x81", b"\xc3\xa9", b"258", b"900"]
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def _write(folder: Path, pieces: Sequence[bytes] = PIECES) -> Path:
    path = folder / "small.tiktoken"
    path.write_bytes(b"".join(base64.b64encode(piece) + b" %d\n" % rank for rank, piece in enumerate(pieces)))
    return path


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> RankFile:
    """PIECES are a published rank file of Qwen's kind."""
    known = RankFile(
        name="Small",
        ranks=len(PIECES),
        digest=digest_of({piece: rank for rank, piece in enumerate(PIECES)}),
        pattern=QWEN_PATTERN,
        normal_form="NFC",
        specials={text: len(PIECES) + index for index, text in enumerate(SPECIALS)},
        vocab_size=len(PIECES) + 10,
    )
    for module in (tokenizer_rank_files, tokenizer_tiktoken):
        monkeypatch.setattr(module, "KNOWN_RANK_FILES", (*KNOWN_RANK_FILES, known))
    return known


def _as_json(folder: Path) -> Path:
    """The same tokenizer as tokenizer.json."""
    letters = {byte: character for character, byte in byte_level_alphabet().items()}
    spelled = ["".join(letters[byte] for byte in piece) for piece in PIECES]
    pairs = [
        (text[:cut], text[cut:])
        for text in spelled
        for cut in range(1, len(text))
        if {text[:cut], text[cut:]} <= {*spelled}
    ]
    tokenizer = Tokenizer(models.BPE({text: index for index, text in enumerate(spelled)}, pairs, ignore_merges=True))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.add_special_tokens(list(SPECIALS))
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def _assert_same(ranks: DocumentTokenizer, spec: DocumentTokenizer, texts: Sequence[str]) -> None:
    documents = [ranks.normalize(text) for text in texts]
    assert documents == [spec.normalize(text) for text in texts]
    expected = spec.encode_batch_reference(documents)
    for encode in (ranks.encode_batch, ranks.encode_batch_reference):
        for document, ours, theirs in zip(documents, encode(documents), expected, strict=True):
            assert ours.tolist() == theirs.tolist(), document


def test_a_known_rank_file_is_its_tokenizer_json(small: RankFile, tmp_path: Path, texts: list[str]) -> None:
    ranks, spec = tokenizers.load(_write(tmp_path)), tokenizers.load(_as_json(tmp_path))
    _assert_same(ranks, spec, [*texts, "the 1212 cafe\u0301 e\u0301\u0327", "258", *SPECIALS])
    for text in texts:
        assert ranks.normalize(text) == unicodedata.normalize("NFC", text)
    table, other = ranks.token_bytes, spec.token_bytes
    assert (table.end_of_text_id, table.bos_id) == (other.end_of_text_id, other.bos_id) == (len(PIECES), None)
    assert table.vocab_size == small.vocab_size and table.special[len(PIECES) :].all()
    assert ranks.encoder == "tiktoken, whose ranks these are (those of Small)"
    sent: DocumentTokenizer = pickle.loads(pickle.dumps(ranks))
    assert sent.normalize("cafe\u0301") == "caf\u00e9"


def test_other_ranks_of_a_known_number_are_unknown(small: RankFile, tmp_path: Path) -> None:
    """They may have been made for another pattern, and for text as it stands."""
    path = _write(tmp_path, [*PIECES[:-1], b"259"])
    with pytest.raises(ValueError, match=rf"split pattern is not known .*Small's own {small.ranks}"):
        tokenizers.load(path)
    loaded = tokenizers.load(path, pattern=QWEN_PATTERN, end_of_text=0)
    assert loaded.normalize("cafe\u0301") == "cafe\u0301" and loaded.encoder == "tiktoken, whose ranks these are"
    with pytest.raises(ValueError, match=r"'<\|im_end\|>' is not in the vocabulary"):
        tokenizers.load(path, pattern=QWEN_PATTERN, end_of_text="<|im_end|>")


def test_a_given_pattern_comes_before_the_known_one(small: RankFile, tmp_path: Path) -> None:
    path = _write(tmp_path)
    counts = [len(tokenizers.load(path, pattern=pattern).encode_batch(["12"])[0]) for pattern in (None, r"\d+|\D+")]
    assert counts == [2, 1]
    assert tokenizers.load(path, pattern=r"\d+|\D+").token_bytes.end_of_text_id == small.specials["<|endoftext|>"]


def test_special_tokens_are_found_by_text(small: RankFile, tmp_path: Path) -> None:
    path = _write(tmp_path)
    table = tokenizers.load(path, end_of_text="<|im_end|>", bos="<|im_start|>").token_bytes
    assert (table.end_of_text_id, table.bos_id) == (small.specials["<|im_end|>"], small.specials["<|im_start|>"])
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>", "bos_token": None}))
    assert tokenizers.load(path).token_bytes.end_of_text_id == small.specials["<|im_end|>"]


@pytest.mark.parametrize(
    ("named", "index"),
    [("270", 270), ("258", PIECES.index(b"258")), ("900", PIECES.index(b"900")), ("7", ord("7")), ("9", ord("9"))],
)
def test_a_number_is_an_id_where_no_token_has_that_text(named: str, index: int, tmp_path: Path) -> None:
    table = tokenizers.load(_write(tmp_path), pattern=QWEN_PATTERN, end_of_text=named, bos=named).token_bytes
    assert (table.end_of_text_id, table.bos_id) == (index, index)
    assert table.vocab_size == max(len(PIECES), index + 1)


def test_numbers_name_ids_for_every_kind(tokenizer: DocumentTokenizer) -> None:
    table = tokenizers.load(tokenizer.path, end_of_text="258", bos="00259").token_bytes
    assert (table.end_of_text_id, table.bos_id) == (258, 259)


@pytest.mark.parametrize("named", ["99999999", 1 << 24, "1677721600", "-1", "2 5", "٢"])
def test_ids_that_no_vocabulary_has_are_refused(named: str | int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"small\.tiktoken: .*(expected less than|is not in the vocabulary)"):
        tokenizers.load(_write(tmp_path), pattern=QWEN_PATTERN, end_of_text=named)


def test_llama3_ranks_need_no_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = [bytes([byte]) for byte in range(256)]
    pieces += [number.to_bytes(3, "little") for number in range(128_000 - 256)]
    digest = digest_of({piece: rank for rank, piece in enumerate(pieces)})
    known = [dataclasses.replace(file, digest=digest) for file in KNOWN_RANK_FILES if file.ranks == 128_000]
    monkeypatch.setattr(tokenizer_rank_files, "KNOWN_RANK_FILES", tuple(known))
    loaded = tokenizers.load(_write(tmp_path, pieces))
    table = loaded.token_bytes
    assert (table.vocab_size, table.bos_id, table.end_of_text_id) == (128_256, 128_000, 128_001)
    [tokens] = loaded.encode_batch(["<|begin_of_text|>x<|end_of_text|>"])
    assert int(tokens.max()) < 128_000
    assert tokenizers.load(loaded.path, end_of_text="<|eot_id|>").token_bytes.end_of_text_id == 128_009


def test_qwens_own_rank_file_is_its_tokenizer_json(texts: list[str]) -> None:
    folder = os.environ.get(QWEN_FOLDER)
    if folder is None:
        pytest.skip(f"{QWEN_FOLDER} names no folder with qwen.tiktoken and Qwen's tokenizer.json")
    ranks = tokenizers.load(Path(folder) / "qwen.tiktoken")
    table = ranks.token_bytes
    assert (table.end_of_text_id, table.bos_id) == (151_643, None)
    for text, index in (("<|im_start|>", 151_644), ("<|im_end|>", 151_645), ("<|extra_0|>", 151_646)):
        assert tokenizers.load(ranks.path, end_of_text=text).token_bytes.end_of_text_id == index
    spec = tokenizers.load(Path(folder) / "tokenizer.json")
    _assert_same(ranks, spec, [*texts, *SPECIALS, "1234 '\u017f x\u00b2 don'T\r\n\r\n  \n", "cafe\u0301" * 50])
    assert all(table[index] == spec.token_bytes[index] for index in range(0, 151_643, 7))
