"""Whatever is wrong with a stored data set, verify says so, and names the place."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megabyte_distill.data.dataset import ByteTokenDataset
from megabyte_distill.data.formats import IndexedReader, IndexedWriter
from megabyte_distill.data.inspect_document import show_document
from megabyte_distill.data.manifest import StoredPaths
from megabyte_distill.data.progress import shown
from megabyte_distill.data.verify import find_stems, verify_dataset

TEXTS = ["one", "", "日本語 text", "a\0b", "the last one"]


@pytest.fixture
def stem(store: Callable[..., str]) -> str:
    """A small correct data set."""
    return store(TEXTS)


def rewrite(prefix: Path, change: Callable[[list[list[int]]], None]) -> None:
    """Store the items of an indexed data set anew after a change to them."""
    reader = IndexedReader(prefix)
    items = [reader.read(item).tolist() for item in range(len(reader))]
    dtype = reader.dtype
    change(items)
    with IndexedWriter(prefix, dtype) as writer:
        for item in items:
            writer.add(np.array(item, dtype=dtype))
        writer.close()


@pytest.mark.usefixtures("every_line")
def test_a_correct_set_passes_and_shows_its_documents(stem: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify_dataset(stem, show=shown).documents == len(TEXTS)
    assert f"verify {stem}: 100 %, {len(TEXTS)} documents of {len(TEXTS)} documents" in capsys.readouterr().err


def put(item: int, place: int, value: int) -> Callable[[list[list[int]]], None]:
    def change(items: list[list[int]]) -> None:
        items[item][place] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put(2, 0, 65), "document 2 does not begin with BOS"),
        (put(4, 3, 254), "document 4 has BOS 254 at byte 2 of its text"),
        (put(2, 3, 0x41), "document 2 is not UTF-8 at byte 0"),
        (put(4, 3, 0x42), "document 4 of .*its tokens do not rebuild its bytes, first difference at byte 2"),
        (lambda items: items[4].append(65), "document 4 of .* tokens do not rebuild"),
        (lambda items: items.pop(), "4 documents as bytes, 5 in the manifest"),
        (lambda items: items[1].clear(), "document 1 has not even BOS"),
    ],
)
def test_damaged_bytes_are_found(stem: str, change: Callable[[list[list[int]]], None], message: str) -> None:
    rewrite(StoredPaths(stem).byte_prefix, change)
    with pytest.raises(ValueError, match=message):
        verify_dataset(stem)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put(0, 0, 5), "document 0 has the tokens .*around its text"),
        (put(0, 1, 5), "document 0 of .*its tokens do not rebuild"),
        (put(0, 1, 60000), "document 0 of .*outside the vocabulary"),
        (lambda items: items[1].clear(), "document 1 has the tokens \\[\\]"),
        (lambda items: items.pop(), "4 documents as tokens"),
    ],
)
def test_damaged_tokens_are_found(stem: str, change: Callable[[list[list[int]]], None], message: str) -> None:
    rewrite(StoredPaths(stem).token_prefix, change)
    with pytest.raises(ValueError, match=message):
        verify_dataset(stem)


@pytest.mark.parametrize(("code", "name"), [(3, "int16"), (4, "int32"), (7, "float32")])
def test_tokens_of_another_dtype_are_found(stem: str, code: int, name: str) -> None:
    path = StoredPaths(stem).token_prefix.with_suffix(".idx")
    content = bytearray(path.read_bytes())
    content[17] = code
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"items of {name}|bytes, expected"):
        verify_dataset(stem)


def test_a_damaged_document_index_is_found(stem: str) -> None:
    path = Path(f"{stem}.idx")
    content = bytearray(path.read_bytes())
    content[-8:] = (10**12).to_bytes(8, "little")
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"document index {len(TEXTS)} says {10**12}: damaged"):
        verify_dataset(stem)


@pytest.mark.parametrize("name", ["documents", "bytes", "tokens", "tokenizer_hash", "vocab_size"])
def test_a_manifest_that_says_something_else_is_found(stem: str, name: str) -> None:
    path = StoredPaths(stem).manifest
    content = json.loads(path.read_text())
    content[name] = "0" * 64 if name == "tokenizer_hash" else content[name] + 1
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"manifest"):
        verify_dataset(stem)


def test_an_index_with_a_gap_is_found(stem: str) -> None:
    path = Path(f"{stem}.idx")
    content = bytearray(path.read_bytes())
    offsets = 34 + 4 * len(TEXTS)
    content[offsets + 8 : offsets + 16] = (1).to_bytes(8, "little")
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"item 1 is at byte 1, not behind the item before it"):
        verify_dataset(stem)


def test_a_prefix_stands_for_all_its_keys(stem: str) -> None:
    prefix = stem.removesuffix("_text_document")
    assert find_stems(prefix) == [stem] == find_stems(stem) == find_stems(f"{stem}.idx")
    with pytest.raises(ValueError, match="no data set"):
        find_stems(prefix + "x")


def test_inspect_marks_each_token_and_names_split_characters(stem: str) -> None:
    dataset = ByteTokenDataset(stem)
    shown = show_document(dataset, 2)
    pieces = [dataset.table[token] for token in dataset[2].tokens.tolist()]
    header, text = shown.split("\n", 1)
    assert f"{len(TEXTS[2].encode())} bytes, {len(pieces)} tokens" in header
    assert text.count("│") == len(pieces)
    split = [piece for piece in pieces if not _is_whole(piece)]
    assert split and all(f"⟨{piece.hex(' ')}⟩│" in text for piece in split)
    assert f"{len(split)} tokens that split a character" in header
    assert "a\\x00b" in show_document(dataset, 3).replace("│", "")
    assert "… 9 more bytes" in show_document(dataset, 4, limit=3)
    with pytest.raises(ValueError, match=r"--document 5: .* has documents 0 … 4"):
        show_document(dataset, 5)


def _is_whole(piece: bytes) -> bool:
    try:
        piece.decode()
    except UnicodeDecodeError:
        return False
    return True
