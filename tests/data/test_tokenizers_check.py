"""What changes nothing is cheap to find out, and the checks on a corpus count what they say."""

from __future__ import annotations

import io
import json
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from numpy.typing import NDArray
from tokenizers import normalizers

from megabyte_distill.data import tokenizers
from megabyte_distill.data.tokenizer_check import TokenizerCheck
from megabyte_distill.data.tokenizer_normal_form import NORMAL_FORMS, is_normal
from megabyte_distill.data.tokenizer_sentencepiece import SentencePieceTokenizer
from scripts.check_real_tokenizers import main


@pytest.mark.parametrize("form", NORMAL_FORMS)
def test_normal_texts_are_those_that_normalising_keeps(form: str, texts: list[str]) -> None:
    normalizer = getattr(normalizers, form)()
    answers = []
    every = [chr(code) for code in (*range(0xD800), *range(0xE000, 0x10000))]
    for text in [*texts, *(f"a{character}\u0301\u0323" for character in every), *every]:
        answers.append(is_normal(text, form))  # type: ignore[arg-type]
        assert not answers[-1] or normalizer.normalize_str(text) == text
    assert any(answers) and not all(answers)


def test_common_texts_are_known_to_be_normal() -> None:
    for text in ("plain", "café", "日本語の文章です。", "Здравствуй", "مُحَمَّد", "हिन्दी", "한국어", "🙂🔎"):
        assert is_normal(text, "NFC")
    assert not is_normal("cafe\u0301", "NFC")
    # Not assigned: a newer Unicode may have rules for them.
    assert not is_normal("\u0378", "NFC") and not is_normal("a\U0003ffff", "NFC")
    assert is_normal(unicodedata.normalize("NFD", "café"), "NFD") and not is_normal("café", "NFD")


def _sentencepiece(folder: Path, *, rule: str, drop_spaces: bool) -> SentencePieceTokenizer:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the house of the mouse", "日本語の文章です"] * 10),
        model_writer=model,
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        normalization_rule_name=rule,
        remove_extra_whitespaces=drop_spaces,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    loaded = tokenizers.load(folder)
    assert isinstance(loaded, SentencePieceTokenizer)
    return loaded


def _forbidden(text: str) -> str:
    raise AssertionError(f"normalised {text!r}")


def test_a_sentencepiece_model_without_rules_does_not_normalise(
    tmp_path: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = _sentencepiece(tmp_path, rule="identity", drop_spaces=False)
    expected = [loaded._normalized(text.replace("▁", " ")) for text in texts]
    monkeypatch.setattr(loaded, "_normalized", _forbidden)
    assert [loaded.normalize(text) for text in texts] == expected


@pytest.mark.parametrize(("rule", "drop_spaces"), [("identity", True), ("nfkc", False), ("nmt_nfkc_cf", True)])
def test_a_sentencepiece_model_with_rules_does(rule: str, drop_spaces: bool, tmp_path: Path) -> None:
    loaded = _sentencepiece(tmp_path, rule=rule, drop_spaces=drop_spaces)
    assert loaded.normalize("a  ﬁ ") == {"identity": "a ﬁ", "nfkc": "a  fi ", "nmt_nfkc_cf": "a fi"}[rule]


class _Wrong:
    """The tokenizer of the fixture with one wrong encoder."""

    def __init__(self, folder: Path) -> None:
        self._inner = tokenizers.load(folder)
        self.kind, self.path, self.encoder = self._inner.kind, self._inner.path, self._inner.encoder
        self.token_bytes, self.segmentation_hash = self._inner.token_bytes, self._inner.segmentation_hash
        self.normalize = self._inner.normalize
        self.encode_batch_reference = self._inner.encode_batch_reference

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        return [
            ids[:-1] if text == "wrong" else ids
            for ids, text in zip(self._inner.encode_batch(texts), texts, strict=True)
        ]


def test_the_check_counts_documents_bytes_and_differences(byte_level_folder: Path) -> None:
    counts = TokenizerCheck()
    counts.add(_Wrong(byte_level_folder), ["right", "wrong", "cafe\u0301", ""])
    assert (counts.documents, counts.bytes, counts.normalized) == (4, 15, 1)
    assert (counts.different_ids, counts.not_rebuilt) == (1, 1)


def test_the_check_counts_tokens_that_split_characters(byte_level_folder: Path) -> None:
    tokenizer = tokenizers.load(byte_level_folder)
    text = "a\U00103456b"  # in no corpus: a token a byte
    [tokens] = tokenizer.encode_batch([text])
    assert len(tokens) == 6
    counts = TokenizerCheck()
    counts.add(tokenizer, [text, "ab", "\U00103456"])
    assert counts.split_characters == 8 and counts.not_rebuilt == 0


def test_the_script_ends_with_one_json_object(
    byte_level_folder: Path, sentencepiece_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "text.jsonl"
    source.write_text("".join(json.dumps({"text": f"the house {number}"}) + "\n" for number in range(100)))
    folders = [str(byte_level_folder), str(sentencepiece_folder)]
    assert main(["--tokenizer", *folders, "--input", str(source)]) == 0
    results = json.loads(capsys.readouterr().out.splitlines()[-1])["tokenizers"]
    assert [result["tokenizer"] for result in results] == folders
    assert all(result["documents"] == 100 and result["bytes"] == 1190 for result in results)
    assert main(["--tokenizer", str(byte_level_folder), "--input", str(source), "--max-bytes", "10"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["tokenizers"][0]["documents"] < 100
    assert main(["--tokenizer", str(tmp_path), "--input", str(source)]) == 2
    assert capsys.readouterr().err.startswith("error: ")
