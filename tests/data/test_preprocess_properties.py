"""Any list of Unicode documents survives preprocess → read, and its boundaries are those of the slow definition."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megabyte_distill.data import tokenizers
from megabyte_distill.data.dataset import ByteTokenDataset
from megabyte_distill.data.tokenizers import DocumentTokenizer
from megabyte_distill.data.verify import verify_dataset
from tests.data.preprocessing import preprocess

AWKWARD = [
    "",
    "\0",
    "\u0301",
    "e\u0301",
    "\u200d",
    "👩‍👩‍👧",
    "▁",
    "\ufeff",
    "\r\n",
    "<s>",
    "日本語",
    "مرحبا",
    "\U0010ffff",
]
DOCUMENTS = st.lists(
    st.one_of(
        st.text(max_size=40),
        st.lists(st.sampled_from([*AWKWARD, "the house ", "1234", "'S", "  "]), max_size=12).map("".join),
    ),
    max_size=12,
)


def check(texts: list[str], tokenizer: DocumentTokenizer, **more: object) -> None:
    """Store, read back, and compare with the definition: token by token, byte by byte."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "a.jsonl"
        source.write_bytes(b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts))
        stem = preprocess([source], output_prefix=Path(folder) / "o", tokenizer_model=tokenizer.path, **more).stems[
            "text"
        ]
        verify_dataset(stem)
        dataset = ByteTokenDataset(stem)
        assert len(dataset) == len(texts)
        for index, text in enumerate(texts):
            document = dataset[index]
            assert document.byte_ids.tobytes() == tokenizer.normalize(text).encode()
            expected: list[bool] = []
            for token in document.tokens.tolist():
                expected += [False] * (len(dataset.table[token]) - 1) + [True]
            assert document.bits.tolist() == expected


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=DOCUMENTS)
def test_any_documents_survive_with_every_tokenizer(texts: list[str], tokenizer: DocumentTokenizer) -> None:
    check(texts, tokenizer)


@pytest.mark.parametrize(
    "text",
    ["x" * 1_000_000, " " * 1_000_000, "\n" * 300_000, "é" * 300_000, "ab " * 300_000, "\u0301" * 200_000],
    ids=["no space", "spaces", "newlines", "accents", "words", "marks"],
)
def test_a_megabyte_of_one_thing_survives(text: str, byte_level_folder: Path) -> None:
    tokenizer = tokenizers.load(byte_level_folder)
    check([text, "behind it"], tokenizer)


def test_many_documents_of_one_byte_survive(byte_level_folder: Path) -> None:
    tokenizer = tokenizers.load(byte_level_folder)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "a.jsonl"
        source.write_bytes(b'{"text":"a"}\n{"text":"b"}\n' * 100_000)
        stem = preprocess([source], output_prefix=Path(folder) / "o", tokenizer_model=tokenizer.path, workers=2).stems[
            "text"
        ]
        assert verify_dataset(stem).documents == 200_000
        dataset = ByteTokenDataset(stem)
        assert [dataset[index].byte_ids.tobytes() for index in (0, 1, 199_998, 199_999)] == [b"a", b"b", b"a", b"b"]
