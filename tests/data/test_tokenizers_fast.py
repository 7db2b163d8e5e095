"""tiktoken gives the ids of tokenizers, or is not used."""

from __future__ import annotations

import base64
import itertools
import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiktoken
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from megabyte_distill.data import tokenizer_fast, tokenizers
from megabyte_distill.data.tokenizer_fast import TiktokenEncoder, has_endless_run
from megabyte_distill.data.tokenizer_pattern import GPT2_PATTERN, NoFastPath, pattern_for_tiktoken
from megabyte_distill.data.tokenizer_rank_files import LLAMA3_PATTERN
from megabyte_distill.data.tokenizer_ranks import Ranks
from megabyte_distill.data.tokenizers import DocumentTokenizer, EncodingError

PLAIN = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
CORPUS = [
    "The houses' cats don't mind 1234 or 56 mice;  they'll sit!!  \n\n  It's 5  o'clock x² x²y²,\n\tnobody\u200c knew.",
    "日本語の文章です。日本の首都は東京です。 ２０２４年 🙂🙂 مرحبا بالعالم ١٢٣ café",
]


def _split(pattern: str, behavior: str = "isolated", *, invert: bool = False) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(pattern), behavior, invert=invert)


def _sequence(*steps: pre_tokenizers.PreTokenizer) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(list(steps))


def _trained(pre_tokenizer: pre_tokenizers.PreTokenizer) -> dict[str, Any]:
    """tokenizer.json of a byte-level BPE that this pre-tokenizer cut the corpus for."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=560,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    spec: dict[str, Any] = json.loads(tokenizer.to_str())
    return spec


def _load(folder: Path, spec: dict[str, Any]) -> DocumentTokenizer:
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    return tokenizers.load(folder)


def _crafted(merges: Sequence[tuple[str, str]], **options: Any) -> dict[str, Any]:
    """tokenizer.json with the single bytes and these merges; options of the model."""
    texts = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    texts += dict.fromkeys(left + right for left, right in merges)
    tokenizer = Tokenizer(models.BPE({text: index for index, text in enumerate(texts)}, list(merges), **options))
    tokenizer.pre_tokenizer = GPT2
    tokenizer.add_special_tokens(["<|endoftext|>"])
    spec: dict[str, Any] = json.loads(tokenizer.to_str())
    return spec


def _assert_same(tokenizer: DocumentTokenizer, texts: Sequence[str]) -> None:
    documents = [tokenizer.normalize(text) for text in texts]
    pairs = zip(tokenizer.encode_batch(documents), tokenizer.encode_batch_reference(documents), strict=True)
    for document, (ours, theirs) in zip(documents, pairs, strict=True):
        assert ours.dtype == np.int32
        assert ours.tolist() == theirs.tolist(), document
        assert tokenizer.token_bytes.concatenate(ours).tobytes() == document.encode()


PRE_TOKENIZERS = {
    "gpt2": GPT2,
    "llama3": _sequence(_split(LLAMA3_PATTERN), PLAIN),
    "dolma2": _sequence(_split(LLAMA3_PATTERN, "removed", invert=True), PLAIN),
    "upper": _sequence(
        _split(
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|'(?i:[sdmt]|ll|ve|re)|"
            r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        ),
        PLAIN,
    ),
    "digits": _sequence(pre_tokenizers.Digits(individual_digits=True), GPT2),
    "numbers": _sequence(pre_tokenizers.Digits(individual_digits=False), GPT2),
    "words": _sequence(_split(r"\w+|\W+"), PLAIN),
}


@pytest.mark.parametrize("whole", [False, True], ids=["merges", "ignore_merges"])
@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_tiktoken_gives_the_ids_of_tokenizers(name: str, whole: bool, tmp_path: Path, texts: list[str]) -> None:
    spec = _trained(PRE_TOKENIZERS[name])
    spec["model"]["ignore_merges"] = whole
    loaded = _load(tmp_path, spec)
    if name == "numbers" and not loaded.encoder.startswith("tiktoken"):
        assert "Digits cuts other characters than numbers" in loaded.encoder
    else:
        assert loaded.encoder.startswith("tiktoken with the ranks of tokenizer.json (identical ids on ")
    mixed = [
        "".join(parts)
        for parts in itertools.product(["x²", " ", "a\u200c", "5", "'s"], ["", "  ", "\n", "b1"], texts[:9])
    ]
    _assert_same(loaded, [*texts, *CORPUS, *mixed, "\u00b2\u00b9x \u200da", "  5  ५ ２ \U00011de0 \n 5"])


def test_classes_that_engines_read_differently_are_written_out(tmp_path: Path) -> None:
    """tokenizers counts ² as a word's character, tiktoken does not."""
    loaded = _load(tmp_path, _trained(PRE_TOKENIZERS["words"]))
    [tokens] = loaded.encode_batch(["x²"])
    assert loaded.encoder.startswith("tiktoken") and len(tokens) == 1


@pytest.mark.parametrize("name", ["NFC", "NFD", "NFKC", "NFKD"])
def test_normal_forms_keep_the_fast_path(name: str, tmp_path: Path, texts: list[str]) -> None:
    loaded = _load(tmp_path, {**_trained(GPT2), "normalizer": {"type": name}})
    assert loaded.encoder.startswith("tiktoken")
    normalizer = getattr(normalizers, name)()
    assert [loaded.normalize(text) for text in texts] == [normalizer.normalize_str(text) for text in texts]
    _assert_same(loaded, texts)


@pytest.mark.parametrize(
    ("reason", "change"),
    [
        ("normaliser Lowercase", {"normalizer": {"type": "Lowercase"}}),
        (
            "Split+Split+ByteLevel is not a single pattern",
            {"pre_tokenizer": json.loads(_sequence(_split("x"), _split("y"), PLAIN).__getstate__())},
        ),
        (
            "behaviour MergedWithNext",
            {"pre_tokenizer": json.loads(_sequence(_split(" ", "merged_with_next"), PLAIN).__getstate__())},
        ),
        ("constructs", {"pre_tokenizer": json.loads(_sequence(_split(r"^\s+|\S+|\s+"), PLAIN).__getstate__())}),
        ("constructs", {"pre_tokenizer": json.loads(_sequence(_split(r"\S{1,3}+|\s+"), PLAIN).__getstate__())}),
        ("constructs", {"pre_tokenizer": json.loads(_sequence(_split(r"(?i:ss)|\S+|\s+"), PLAIN).__getstate__())}),
        ("leaves characters out", {"pre_tokenizer": json.loads(_sequence(_split(r"\S+"), PLAIN).__getstate__())}),
    ],
)
def test_what_tiktoken_cannot_express_stays_with_tokenizers(
    reason: str, change: dict[str, Any], tmp_path: Path, texts: list[str]
) -> None:
    loaded = _load(tmp_path, {**_trained(GPT2), **change})
    assert loaded.encoder.startswith("tokenizers, batched (") and reason in loaded.encoder
    _assert_same(loaded, texts)


def test_other_families_say_their_encoder(metaspace_folder: Path, sentencepiece_folder: Path, tmp_path: Path) -> None:
    assert tokenizers.load(metaspace_folder).encoder == "tokenizers, batched (not byte-level)"
    assert tokenizers.load(sentencepiece_folder).encoder == "sentencepiece, batched"
    assert _rank_file(tmp_path, GPT2_PATTERN).encoder == "tiktoken, whose ranks these are"


def test_ids_need_not_be_in_the_order_of_the_merges(tmp_path: Path, texts: list[str]) -> None:
    spec = _trained(GPT2)
    vocabulary = spec["model"]["vocab"]
    last = max(vocabulary.values())
    spec["model"]["vocab"] = {text: index and last + 1 - index for text, index in vocabulary.items()}
    loaded = _load(tmp_path, spec)
    assert loaded.encoder.startswith("tiktoken")
    _assert_same(loaded, [*texts, *CORPUS])


def test_bytes_that_the_vocabulary_lacks_are_left_out_as_by_tokenizers(tmp_path: Path, texts: list[str]) -> None:
    """SmolLM2 lacks some; the documents that have them do not rebuild, which is found out later."""
    spec = _trained(GPT2)
    for text in ("Ú", "\u0101"):  # the bytes 0xDA and 0x01
        del spec["model"]["vocab"][text]
        spec["model"]["merges"] = [merge for merge in spec["model"]["merges"] if text not in "".join(merge)]
    loaded = _load(tmp_path, spec)
    assert loaded.encoder.startswith("tiktoken")
    documents = [*texts, "a\x01b", "a\u0681\u0681b", "\x01"]
    pairs = zip(loaded.encode_batch(documents), loaded.encode_batch_reference(documents), strict=True)
    assert all(ours.tolist() == theirs.tolist() for ours, theirs in pairs)
    assert [tokens.size for tokens in loaded.encode_batch(["a\x01b", "ab"])] == [2, 2]


def test_a_token_that_merging_never_gives_does_not_come_out(tmp_path: Path) -> None:
    merges = [("a", "b"), ("b", "c"), ("a", "bc")]  # "abc" begins with ab, so that a and bc never meet
    loaded = _load(tmp_path, _crafted(merges))
    assert loaded.encoder.startswith("tiktoken")
    _assert_same(loaded, ["abc", "bc", "xabc"])
    [tokens] = loaded.encode_batch(["abc"])
    assert [loaded.token_bytes[token] for token in tokens] == [b"ab", b"c"]


def test_tokens_taken_whole_need_all_their_merges(tmp_path: Path) -> None:
    """tokenizers leaves ab and c apart inside a longer piece, tiktoken would join them."""
    merges = [("a", "b"), ("b", "c"), ("a", "bc")]
    loaded = _load(tmp_path, _crafted(merges, ignore_merges=True))
    assert "pairs outside the merges" in loaded.encoder
    assert [tokens.size for tokens in loaded.encode_batch(["abc", "xabc"])] == [1, 3]
    complete = _load(tmp_path, _crafted([*merges, ("ab", "c")], ignore_merges=True))
    assert complete.encoder.startswith("tiktoken")
    assert [tokens.size for tokens in complete.encode_batch(["abc", "xabc"])] == [1, 2]
    _assert_same(complete, ["abc", "xabc", "abcabc"])


def test_merges_of_one_token_that_stand_apart_are_left_to_tokenizers(tmp_path: Path) -> None:
    merges = [("a", "b"), ("b", "c"), ("ab", "c"), ("c", "d"), ("a", "bc")]
    assert "merges do not stand together" in _load(tmp_path, _crafted(merges)).encoder


def test_the_selftest_finds_a_wrong_pattern(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = GPT2_PATTERN.replace(r" ?\p{L}+", r"\p{L}+")
    monkeypatch.setattr(tokenizer_fast, "pattern_for_tiktoken", lambda _: wrong)
    loaded = _load(tmp_path, _trained(GPT2))
    assert loaded.encoder.startswith("tokenizers, batched (tiktoken gives other ids for ")
    monkeypatch.setattr(tokenizer_fast, "pattern_for_tiktoken", lambda _: GPT2_PATTERN)
    assert _load(tmp_path, _trained(GPT2)).encoder.startswith("tiktoken")


@pytest.mark.parametrize("special", [False, True])
def test_added_tokens_in_the_vocabulary_are_not_taken_whole(special: bool, tmp_path: Path) -> None:
    spec = _crafted([("t", "o")], ignore_merges=True)
    spec["pre_tokenizer"] = json.loads(_sequence(_split(r"\S+|\s+"), PLAIN).__getstate__())
    tool = len(spec["model"]["vocab"])
    spec["model"]["vocab"]["<tool>"] = tool
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    spec["added_tokens"].append({"id": tool, "content": "<tool>", "special": special, **added})
    loaded = _load(tmp_path, spec)
    assert loaded.encoder.startswith("tiktoken")
    assert loaded.token_bytes[tool] == (b"" if special else b"<tool>")
    for encode in (loaded.encode_batch, loaded.encode_batch_reference):
        [tokens] = encode(["<tool>"])
        assert [loaded.token_bytes[token] for token in tokens] == [b"<", b"to", b"o", b"l", b">"]


def _rank_file(
    folder: Path, pattern: str, pieces: Sequence[bytes] = (b"  ", b"    ", b"th", b"the")
) -> DocumentTokenizer:
    everything = [bytes([byte]) for byte in range(256)] + list(pieces)
    lines = [base64.b64encode(piece) + b" %d\n" % rank for rank, piece in enumerate(everything)]
    path = folder / "ranks.tiktoken"
    path.write_bytes(b"".join(lines))
    return tokenizers.load(path, pattern=pattern, end_of_text=len(everything))


@pytest.mark.parametrize("pattern", [GPT2_PATTERN, LLAMA3_PATTERN, r"\w+|\W+"])
def test_rank_files_have_an_equal_stand_in(pattern: str, tmp_path: Path, texts: list[str]) -> None:
    """Also for a token that merging never gives: abc is whole only where it is a piece."""
    loaded = _rank_file(tmp_path, pattern, [b"ab", b"bc", b"abc", b"  ", b"    ", b"th", b"the", b"x\xc2\xb2"])
    _assert_same(loaded, [*texts, "abc xabc abcabc", "x² x\u200cy²", *CORPUS])


ENDLESS = {
    "spaces": " " * 1_200_000,
    "tabs": "a" + "\t" * 40_000,
    "letters": "ab" * 30_000,
    "ideographs": "字" * 25_000,
}


@pytest.mark.parametrize("name", ENDLESS)
@pytest.mark.parametrize("kind", ["tokenizer.json", "ranks"])
def test_endless_runs_are_encoded_in_their_place(kind: str, name: str, tmp_path: Path) -> None:
    if kind == "ranks":
        loaded = _rank_file(tmp_path, LLAMA3_PATTERN)
    else:
        loaded = _load(tmp_path, _trained(PRE_TOKENIZERS["llama3"]))
    assert loaded.encoder.startswith("tiktoken")
    assert has_endless_run(ENDLESS[name])
    documents = ["the first", ENDLESS[name], "the last"]
    encoded = loaded.encode_batch(documents)
    assert [loaded.token_bytes.concatenate(tokens).tobytes().decode() for tokens in encoded] == documents
    _assert_same(loaded, documents)


@pytest.mark.parametrize("run", [" ", "\t \n", "a", "字", "7", "-=_"])
def test_runs_of_twice_the_block_are_found_anywhere(run: str) -> None:
    for start in (0, 1, 9_999, 10_001, 77_777):
        text = "word, and " * (start // 10 + 1)
        assert has_endless_run(text[:start] + (run * 20_000)[:20_000] + text)


@pytest.mark.parametrize("text", ["word, and ", "a1", "漢字、", "x" * 9_000 + " ", "- "])
def test_other_text_has_no_endless_run(text: str) -> None:
    assert not has_endless_run(text * 10_000)
    assert not has_endless_run(" " * 9_999)


def test_endless_runs_without_a_stand_in_are_a_clear_error(tmp_path: Path) -> None:
    loaded = _rank_file(tmp_path, r"\S+|\s+$|\s")
    assert loaded.encode_batch(["a b"])[0].size == 3
    for encode, place in ((loaded.encode_batch, 1), (loaded.encode_batch_reference, 0)):
        with pytest.raises(EncodingError, match=r"ranks\.tiktoken: .*constructs.*shorten such runs") as caught:
            encode(["a b", " " * 30_000, "c", "\t" * 30_000])
        assert caught.value.index == place
    assert loaded.encode_batch_reference([]) == []


def test_errors_name_the_text_that_the_reference_refused() -> None:
    def reference(texts: Sequence[str]) -> list[NDArray[np.int32]]:
        raise EncodingError(f"refuses {texts[1]}", index=1)

    encoder = TiktokenEncoder(
        "picky", GPT2_PATTERN, Ranks({bytes([byte]): byte for byte in range(256)}, None), reference
    )
    endless = " " * 30_000
    with pytest.raises(EncodingError, match=rf"^refuses {endless}!$") as caught:
        encoder.encode_batch(["a", endless, "b", f"{endless}!", endless])
    assert caught.value.index == 3


def test_encoding_errors_cross_a_process_boundary() -> None:
    sent = pickle.loads(pickle.dumps(EncodingError("why", index=7)))
    assert isinstance(sent, EncodingError) and (str(sent), sent.index) == ("why", 7)


class PanicException(BaseException):
    """As pyo3 calls it."""


def _broken(error: BaseException) -> TiktokenEncoder:
    def reference(texts: Sequence[str]) -> list[NDArray[np.int32]]:
        return [np.array([len(text)], dtype=np.int32) for text in texts]

    def encode_to_numpy(text: str, **_: object) -> NDArray[np.uint32]:
        if text == "bad":
            raise error
        return np.array([7], dtype=np.uint32)

    ranks = Ranks({bytes([byte]): byte for byte in range(256)}, None)
    encoder = TiktokenEncoder("broken", GPT2_PATTERN, ranks, reference)
    encoder._encoding.encode_to_numpy = encode_to_numpy  # type: ignore[method-assign]
    return encoder


@pytest.mark.parametrize("error", [PanicException("stack"), ValueError("Regex error while tokenizing")])
def test_a_text_on_which_tiktoken_breaks_down_goes_to_the_reference(error: BaseException) -> None:
    encoded = _broken(error).encode_batch(["a", "bad", "b"])
    assert [ids.tolist() for ids in encoded] == [[7], [3], [7]]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1), MemoryError()])
def test_other_exceptions_pass(error: BaseException) -> None:
    with pytest.raises(type(error)):
        _broken(error).encode_batch(["bad"])


def test_half_a_surrogate_pair_is_an_error_on_every_path(byte_level_folder: Path, tmp_path: Path) -> None:
    for loaded in (tokenizers.load(byte_level_folder), _rank_file(tmp_path, GPT2_PATTERN)):
        with pytest.raises((UnicodeEncodeError, TypeError)):
            loaded.encode_batch(["a\ud800"])


def test_a_pattern_must_cover_every_character() -> None:
    step = json.loads(_sequence(_split(r"[^\p{L}]+|\p{Lu}+"), PLAIN).__getstate__())
    with pytest.raises(NoFastPath, match="leaves characters out"):
        pattern_for_tiktoken(step)


def test_tiktoken_still_leaves_unmatched_text_out() -> None:
    """The reading of character classes rests on it."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    encoding = tiktoken.Encoding("letters", pat_str=r"\p{L}", mergeable_ranks=ranks, special_tokens={})
    assert bytes(encoding.encode_ordinary("a1 b")) == b"ab"
