from __future__ import annotations

import base64
import json
import pickle
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from megabyte_distill.data import tokenizers
from megabyte_distill.data.alignment import check_rebuild
from megabyte_distill.data.tokenizer_rank_files import LLAMA3_PATTERN
from megabyte_distill.data.tokenizers import DocumentTokenizer, TokenizerKind


def _rank_file(folder: Path, pieces: list[bytes]) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "tokenizer.model"
    path.write_bytes(b"".join(base64.b64encode(piece) + b" %d\n" % rank for rank, piece in enumerate(pieces)))
    return path


def _pieces() -> list[bytes]:
    return [bytes([byte]) for byte in range(256)] + [b"th", b"the", b" the", b"\xe6\x97"]


def test_tokens_spell_every_document(tokenizer: DocumentTokenizer, texts: list[str]) -> None:
    documents = [tokenizer.normalize(text) for text in texts]
    for index, (document, tokens) in enumerate(zip(documents, tokenizer.encode_batch(documents), strict=True)):
        assert tokens.dtype == np.int32
        check_rebuild(tokens, np.frombuffer(document.encode(), np.uint8), tokenizer.token_bytes, document=index)


def test_normalisation_is_idempotent(tokenizer: DocumentTokenizer, texts: list[str]) -> None:
    for text in texts:
        assert tokenizer.normalize(tokenizer.normalize(text)) == tokenizer.normalize(text)


def test_batches_do_not_change_tokens(tokenizer: DocumentTokenizer, texts: list[str]) -> None:
    documents = [tokenizer.normalize(text) for text in texts[:20]]
    for document, tokens in zip(documents, tokenizer.encode_batch(documents), strict=True):
        np.testing.assert_array_equal(tokenizer.encode_batch([document])[0], tokens)


def test_special_text_is_text(tokenizer: DocumentTokenizer) -> None:
    text = "<|endoftext|>a<s></s><unk>"
    [tokens] = tokenizer.encode_batch([text])
    assert tokenizer.token_bytes.concatenate(tokens).tobytes() == text.encode()
    assert not tokenizer.token_bytes.special[tokens].any()


def test_no_space_is_put_in_front(tokenizer: DocumentTokenizer) -> None:
    [tokens] = tokenizer.encode_batch(["the house"])
    assert tokenizer.token_bytes.concatenate(tokens).tobytes() == b"the house"


def test_byte_level_normalisation_is_the_tokenizers_own(byte_level_folder: Path) -> None:
    tokenizer = tokenizers.load(byte_level_folder)
    assert tokenizer.kind is TokenizerKind.HUGGINGFACE
    assert tokenizer.normalize("cafe\u0301 ▁") == unicodedata.normalize("NFC", "cafe\u0301 ▁")


def test_space_marks_in_text_are_spaces_for_their_family(metaspace_folder: Path, sentencepiece_folder: Path) -> None:
    for folder in (metaspace_folder, sentencepiece_folder):
        assert tokenizers.load(folder).normalize("a▁b c") == "a b c"


def test_byte_tokens_stand_for_their_byte(metaspace_folder: Path, sentencepiece_folder: Path) -> None:
    for folder in (metaspace_folder, sentencepiece_folder):
        table = tokenizers.load(folder).token_bytes
        singles = {table[index] for index in range(table.vocab_size) if len(table[index]) == 1}
        assert singles == {bytes([byte]) for byte in range(256)}
        assert table.duplicates  # such as <0x20> and the space mark


def test_metaspace_pre_tokenizer_is_read_without_prefix(tmp_path: Path) -> None:
    vocabulary = {"<unk>": 0, "▁": 1, "a": 2, "▁a": 3, "</s>": 4}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("▁", "a")], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = tokenizers.load(tmp_path)
    assert [ids.tolist() for ids in loaded.encode_batch(["a a", " a"])] == [[2, 3], [3]]
    [unknown] = loaded.encode_batch(["b"])
    assert loaded.token_bytes.special[unknown].all()


def test_user_defined_symbols_are_text_in_one_piece(gemma_folder: Path, texts: list[str]) -> None:
    """As the tokenizers library has it, of which only what it adds is left out."""
    theirs, loaded = Tokenizer.from_file(str(gemma_folder / "tokenizer.json")), tokenizers.load(gemma_folder)
    table = loaded.token_bytes
    assert (table.end_of_text_id, table.bos_id) == (1, 2)
    document = "the\n\n\n<table>  a   the     the\tthe<unused0> 日本\0é"
    for text in (document, *map(loaded.normalize, texts)):
        if "<" in text.replace("<table>", "").replace("<unused0>", ""):
            continue  # theirs turns "<eos>" into an event
        [ids] = loaded.encode_batch([text])
        assert ids.tolist() == theirs.encode(text, add_special_tokens=False).ids
        assert table.concatenate(ids).tobytes() == text.encode()
    [ids] = loaded.encode_batch([document])
    assert [theirs.id_to_token(index) for index in ids[:5]] == ["t", "he", "\n\n", "\n", "<table>"]
    assert table[theirs.token_to_id("▁▁▁▁")] == b"    "


def test_events_are_no_symbols_even_where_the_file_does_not_call_them_special(
    gemma_folder: Path, tmp_path: Path
) -> None:
    """Phi-3's kind: text that spells the end of text is text."""
    spec = json.loads((gemma_folder / "tokenizer.json").read_text())
    spec["added_tokens"] = [{**token, "special": False} for token in spec["added_tokens"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    shutil.copy(gemma_folder / "tokenizer_config.json", tmp_path)
    plain, loaded = tokenizers.load(gemma_folder), tokenizers.load(tmp_path)
    table = loaded.token_bytes
    assert (table.end_of_text_id, table.bos_id, table[3]) == (1, 2, b"")
    for name in ("<eos>", "<bos>", "<unk>"):
        text = f"the{name}<table>  a"
        [ids] = pickle.loads(pickle.dumps(loaded)).encode_batch([text])  # as in a worker
        assert table.concatenate(ids).tobytes() == text.encode() and not table.special[ids].any()
        assert loaded.encode_batch([text])[0].tolist() == ids.tolist() == plain.encode_batch([text])[0].tolist()


def test_ids_come_from_the_files(byte_level_folder: Path, metaspace_folder: Path, sentencepiece_folder: Path) -> None:
    byte_level = tokenizers.load(byte_level_folder).token_bytes
    assert (byte_level.end_of_text_id, byte_level.bos_id, byte_level.start_id) == (0, None, 0)
    for folder in (metaspace_folder, sentencepiece_folder):
        table = tokenizers.load(folder).token_bytes
        assert (table.end_of_text_id, table.bos_id) == (2, 1)


def test_ids_and_width_come_from_config_json(byte_level_folder: Path, tmp_path: Path) -> None:
    shutil.copy(byte_level_folder / "tokenizer.json", tmp_path / "tokenizer.json")
    config = {"eos_token_id": [0, 5], "bos_token_id": 3, "vocab_size": 512}
    (tmp_path / "config.json").write_text(json.dumps(config))
    table = tokenizers.load(tmp_path).token_bytes
    assert (table.end_of_text_id, table.bos_id, table.vocab_size) == (0, 3, 512)
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))
    with pytest.raises(ValueError, match=r"only 100.*another tokenizer"):
        tokenizers.load(tmp_path)


def test_a_special_token_behind_the_models_vocabulary_is_left_out(gemma_folder: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(gemma_folder / "tokenizer.json"))
    size = tokenizer.get_vocab_size()
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": size}))
    tokenizer.add_special_tokens(["<image_soft_token>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert tokenizers.load(tmp_path).token_bytes.vocab_size == size
    with pytest.raises(ValueError, match="belongs to another tokenizer"):  # if it were the one that ends a document
        tokenizers.load(tmp_path, end_of_text="<image_soft_token>")
    tokenizer.add_tokens(["<text>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=f"only {size}; config.json beside it belongs to another tokenizer"):
        tokenizers.load(tmp_path)


def test_a_bare_file_finds_well_known_ids(byte_level_folder: Path, tmp_path: Path) -> None:
    shutil.copy(byte_level_folder / "tokenizer.json", tmp_path / "mine.json")
    table = tokenizers.load(tmp_path / "mine.json").token_bytes
    assert (table.end_of_text_id, table.bos_id) == (0, None)
    assert tokenizers.load(tmp_path / "mine.json", end_of_text=7, bos="<|endoftext|>").token_bytes.bos_id == 0
    with pytest.raises(ValueError, match="'<nope>' is not in the vocabulary"):
        tokenizers.load(tmp_path / "mine.json", end_of_text="<nope>")


def test_added_tokens_never_come_out_of_text(byte_level_folder: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(byte_level_folder / "tokenizer.json"))
    tokenizer.add_tokens(["<tool>"])
    tokenizer.add_special_tokens(["<turn>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = tokenizers.load(tmp_path)
    tool, turn = tokenizer.token_to_id("<tool>"), tokenizer.token_to_id("<turn>")
    assert tool is not None and turn is not None
    assert loaded.token_bytes[tool] == b"<tool>" and loaded.token_bytes[turn] == b""
    text = "a<tool>b<turn>"
    for encode in (loaded.encode_batch, loaded.encode_batch_reference):
        [tokens] = encode([text])
        assert tool not in tokens and turn not in tokens
        assert loaded.token_bytes.concatenate(tokens).tobytes() == text.encode()
        assert tokens.tolist() == tokenizers.load(byte_level_folder).encode_batch([text])[0].tolist()


def test_tiktoken_ranks_spell_every_document(tmp_path: Path, texts: list[str]) -> None:
    path = _rank_file(tmp_path / "t", _pieces())
    loaded = tokenizers.load(path.parent, pattern=LLAMA3_PATTERN, end_of_text=len(_pieces()))
    assert loaded.kind is TokenizerKind.TIKTOKEN and loaded.token_bytes.vocab_size == len(_pieces()) + 1
    for text, tokens in zip(texts, loaded.encode_batch(texts), strict=True):
        assert loaded.token_bytes.concatenate(tokens).tobytes() == text.encode()
    [tokens] = loaded.encode_batch(["the the"])
    assert tokens.tolist() == [257, 258]


def test_damaged_and_unknown_rank_files_are_refused(tmp_path: Path) -> None:
    path = _rank_file(tmp_path / "t", _pieces())
    with pytest.raises(ValueError, match="split pattern is not known"):
        tokenizers.load(path)
    path.write_bytes(path.read_bytes() + b"!!! x\n")
    with pytest.raises(ValueError, match=f"line {len(_pieces()) + 1}"):
        tokenizers.load(path, pattern=LLAMA3_PATTERN)


def test_missing_or_wrong_tokenizers_are_refused(tmp_path: Path, byte_level_folder: Path) -> None:
    with pytest.raises(ValueError, match="no such tokenizer"):
        tokenizers.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no usable tokenizer"):
        tokenizers.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{broken")
    with pytest.raises(ValueError, match=r"not a tokenizer\.json"):
        tokenizers.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": []}')
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        tokenizers.load(tmp_path)
    (tmp_path / "garbage.model").write_bytes(b"\x00garbage")
    with pytest.raises(ValueError, match="neither a SentencePiece model"):
        tokenizers.load(tmp_path / "garbage.model")
    with pytest.raises(ValueError, match=r"found tokenizer\.json \(huggingface\)"):
        tokenizers.load(byte_level_folder, kind=TokenizerKind.SENTENCEPIECE)
    with pytest.raises(ValueError, match="split pattern belongs to tiktoken"):
        tokenizers.load(byte_level_folder, pattern="x")


@pytest.mark.parametrize("change", [{"content": None}, {"content": 7}, {"id": "x"}, {"id": -1}, {"id": 1 << 40}])
def test_damaged_added_tokens_are_refused(change: dict[str, object], byte_level_folder: Path, tmp_path: Path) -> None:
    spec = json.loads((byte_level_folder / "tokenizer.json").read_text())
    spec["added_tokens"].append({**spec["added_tokens"][0], "content": "<new>", **change})
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(ValueError, match=r"not a tokenizer\.json .*expected a text and an id"):
        tokenizers.load(tmp_path)


def test_word_level_tokenizers_have_no_exact_bytes(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="tokens without exact bytes"):
        tokenizers.load(tmp_path)


def test_a_bos_that_nobody_named_must_be_a_special_token(tmp_path: Path) -> None:
    """Qwen's vocabulary has the ordinary token "<s>", and Qwen has no BOS."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {text: index for index, text in enumerate([*alphabet, "<s", "<s>"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("<", "s"), ("<s", ">")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert tokenizers.load(tmp_path).token_bytes.bos_id is None
    tokenizer.add_special_tokens(["<bos>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert tokenizers.load(tmp_path).token_bytes.bos_id == tokenizer.token_to_id("<bos>")
