"""Small real tokenizers, awkward texts and stored data sets."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from megabyte_distill.data import tokenizers
from megabyte_distill.data.dataset import ByteTokenDataset
from megabyte_distill.data.tokenizers import DocumentTokenizer
from tests.data.preprocessing import preprocess

CORPUS = [
    "The house stood on the hill, and the wind went round the house. It was nobody's house, 1234 years old.",
    "def main(argv):\n    return sum(int(value) for value in argv)\n\n\nif __name__ == '__main__':\n    main([])\n",
    "日本語の文章です。東京は日本の首都です。",
    "مرحبا بالعالم، كيف حالك اليوم؟",
]
TEXTS = [
    "",
    "\0",
    "a",
    " leading and  double   spaces \t\n",
    "The house stood on the hill, \0 and the wind went round.",
    "e\u0301 \u0301 lone combining, café and cafe\u0301",
    "日本語の文章です。東京は日本の首都です。",
    "مرحبا بالعالم، كيف حالك اليوم؟",
    "👩‍👩‍👧‍👦 🙂🇯🇵",
    "def f(x):\n\treturn {'a': x[::-1]}  # 'tis\r\n",
    "<|endoftext|> and <s> and </s> are text here, <0x41> too",
    "▁marks▁ ▁ are spaces for some",
    "\ufeffbom, \u200b zero width, ﬁ ligature, \U0010ffff",
]


def random_texts(seed: int, count: int) -> list[str]:
    """Documents of random pieces, empty ones among them."""
    choose = random.Random(seed)
    pieces = [*TEXTS, *"aé日🙂\0\n ", *CORPUS]
    return ["".join(choose.choices(pieces, k=choose.randrange(0, 9))) for _ in range(count)]


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Awkward documents, then random ones."""
    return [*TEXTS, *random_texts(0, 120)]


def _folder(path: Path, tokenizer: Tokenizer, **config: object) -> Path:
    path.mkdir()
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(scope="session")
def byte_level_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Byte-level BPE that adds a prefix space and a template unless stopped; no BOS, as Qwen; NFC."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    path = tmp_path_factory.mktemp("tokenizers") / "byte_level"
    return _folder(path, tokenizer, eos_token="<|endoftext|>", bos_token=None)


@pytest.fixture(scope="session")
def metaspace_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Llama 2's kind of tokenizer.json: Prepend and Replace as normaliser, BPE with byte fallback."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for piece in ("▁", "t", "h", "e", "▁t", "he", "▁the", "a", "日"):
        vocabulary[piece] = len(vocabulary)
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    path = tmp_path_factory.mktemp("tokenizers") / "metaspace"
    return _folder(path, tokenizer, eos_token={"content": "</s>"}, bos_token={"content": "<s>"})


@pytest.fixture(scope="session")
def gemma_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gemma's kind of tokenizer.json: no prefix, byte fallback with a tab of its own, user-defined symbols."""
    symbols = ["<unused0>", "<table>", "\n\n", "  ", "   ", "▁▁▁▁"]
    vocabulary = {piece: index for index, piece in enumerate(("<pad>", "<eos>", "<bos>", "<unk>", *symbols))}
    for byte in range(256):
        vocabulary["\t" if byte == 9 else f"<0x{byte:02X}>"] = len(vocabulary)
    for piece in ("▁", "\n", "t", "h", "e", "a", "日", "▁t", "he", "▁the", "▁▁", "e\n"):
        vocabulary[piece] = len(vocabulary)
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("▁", "▁"), ("▁▁", "▁▁"), ("e", "\n")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.add_special_tokens(["<pad>", "<eos>", "<bos>", "<unk>"])
    tokenizer.add_tokens([AddedToken(symbol, normalized=False) for symbol in symbols])
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    path = tmp_path_factory.mktemp("tokenizers") / "gemma"
    return _folder(path, tokenizer, eos_token="<eos>", bos_token="<bos>")


@pytest.fixture(scope="session")
def sentencepiece_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model that was trained with the dummy prefix, NFKC and byte fallback."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 10),
        model_writer=model,
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        normalization_rule_name="nfkc",
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("tokenizers") / "sentencepiece"
    path.mkdir()
    (path / "tokenizer.model").write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="session", params=["byte_level", "metaspace", "gemma", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest) -> DocumentTokenizer:
    """Each kind in turn."""
    return tokenizers.load(request.getfixturevalue(f"{request.param}_folder"))


@pytest.fixture
def store(tmp_path: Path, byte_level_folder: Path) -> Callable[..., str]:
    """Preprocesses texts and returns the stem."""

    def store(texts: list[str], name: str = "set", tokenizer_model: Path = byte_level_folder) -> str:
        source = tmp_path / f"{name}.jsonl"
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        summary = preprocess([str(source)], output_prefix=tmp_path / name, tokenizer_model=tokenizer_model)
        return summary.stems["text"]

    return store


@pytest.fixture
def dataset(store: Callable[..., str], texts: list[str]) -> ByteTokenDataset:
    """The awkward and the random documents, stored."""
    return ByteTokenDataset(store(texts))
