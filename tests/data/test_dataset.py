from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

from megabyte_distill.alphabet import BOS_BYTE
from megabyte_distill.config.blend import parse_split
from megabyte_distill.data import tokenizers
from megabyte_distill.data.dataset import ByteTokenDataset, Part, open_blend, split_documents
from megabyte_distill.data.formats import IndexedReader, IndexedWriter
from megabyte_distill.data.manifest import NO_TOKENIZER, StoredPaths
from megabyte_distill.data.packing import PackedRow
from megabyte_distill.data.sampler import RowStream, evaluation_rows

Store = Callable[..., str]


def test_documents_are_the_normalised_texts(
    dataset: ByteTokenDataset, texts: list[str], byte_level_folder: Path
) -> None:
    tokenizer = tokenizers.load(byte_level_folder)
    assert len(dataset) == len(texts) and dataset.table.hash == tokenizer.token_bytes.hash
    for index, text in enumerate(texts):
        document = dataset[index]
        assert document.byte_ids.tobytes() == tokenizer.normalize(text).encode()
        assert document.bits.sum() == document.tokens.size and document.bits.size == document.byte_ids.size
        assert dataset.num_bytes(index) == document.byte_ids.size and dataset.num_tokens(index) == document.tokens.size


def test_stored_items_begin_with_bos_and_start_id(store: Store, sentencepiece_folder: Path) -> None:
    paths = StoredPaths(store(["a b", ""], "sp", sentencepiece_folder))
    byte_items, token_items = IndexedReader(paths.byte_prefix), IndexedReader(paths.token_prefix)
    assert byte_items.dtype == np.uint8 and token_items.dtype == np.uint16
    assert [int(byte_items.read(i)[0]) for i in range(2)] == [BOS_BYTE] * 2
    assert [int(token_items.read(i)[0]) for i in range(2)] == [1, 1]
    assert byte_items.read(1).size == token_items.read(1).size == 1


def test_megatron_reads_a_stored_set(store: Store) -> None:
    indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset", reason="megatron-core is not installed")
    theirs = indexed.IndexedDataset(store(["abc", ""]))
    assert np.array(theirs[0]).tolist() == [BOS_BYTE, 97, 98, 99] and np.array(theirs[1]).tolist() == [BOS_BYTE]


def test_another_tokenizer_is_refused(store: Store) -> None:
    stem = store(["a"])
    own = ByteTokenDataset(stem).table.hash
    ByteTokenDataset(stem, tokenizer_hash=own)
    with pytest.raises(ValueError, match=r"another tokenizer.*expected 00ff"):
        ByteTokenDataset(stem, tokenizer_hash="00ff")


@pytest.mark.parametrize("ending", [".bin", ".idx", ".json", ".token_bytes.npz"])
def test_a_missing_or_truncated_part_is_named(store: Store, ending: str) -> None:
    stem = store(["some text", "more"])
    path = Path(stem + ending)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError) as error:
        ByteTokenDataset(stem)
    assert str(path) in str(error.value)
    path.unlink()
    with pytest.raises(ValueError) as error:
        ByteTokenDataset(stem)
    assert str(path) in str(error.value)


def test_parts_of_different_runs_are_refused(store: Store, metaspace_folder: Path) -> None:
    stem, other = store(["a", "b"]), store(["a"], "other", metaspace_folder)
    mine, theirs = StoredPaths(stem), StoredPaths(other)
    content = mine.token_table.read_bytes()
    mine.token_table.write_bytes(theirs.token_table.read_bytes())
    with pytest.raises(ValueError, match="files of different runs"):
        ByteTokenDataset(stem)
    mine.token_table.write_bytes(content)
    for ending in (".bin", ".idx"):
        Path(f"{mine.token_prefix}{ending}").write_bytes(Path(f"{theirs.token_prefix}{ending}").read_bytes())
    with pytest.raises(ValueError, match="2 documents as bytes, 1 as tokens, 2 in the manifest"):
        ByteTokenDataset(stem)


def _replace_tokens(stem: str, items: list[list[int]]) -> None:
    with IndexedWriter(StoredPaths(stem).token_prefix, np.uint16) as writer:
        for item in items:
            writer.add(np.array(item, dtype=np.uint16))
        writer.close()


def test_tokens_that_do_not_rebuild_name_document_and_offset(store: Store) -> None:
    stem = store(["aa", "ab"])
    good = ByteTokenDataset(stem)
    a, b = good[1].tokens.tolist()
    start = good.table.start_id
    _replace_tokens(stem, [[start, a, a], [start, a, a]])
    broken = ByteTokenDataset(stem)
    broken[0]
    with pytest.raises(ValueError, match=r"document 1 of .*first difference at byte 1"):
        broken[1]
    stream = RowStream([broken], row_bytes=16, chunk_bucket=4, seed=0)
    with pytest.raises(ValueError, match=r"document 1 of .*first difference at byte 1"):
        for plan in stream.next_rows(4):
            stream.materialize(plan)
    _replace_tokens(stem, [[start, a, a], [start, a]])
    stream = RowStream([ByteTokenDataset(stem)], row_bytes=16, chunk_bucket=4, seed=0)
    with pytest.raises(ValueError, match=r"document 1 of .*first difference at byte 1"):
        for plan in stream.next_rows(4):
            stream.materialize(plan)
    _replace_tokens(stem, [[start, a, a], [b, a, b]])
    with pytest.raises(ValueError, match="document 1 starts with"):
        ByteTokenDataset(stem)[1]
    _replace_tokens(stem, [[start, a, a], [start, a, 60000]])
    with pytest.raises(ValueError, match="document 1 has token ids from"):
        ByteTokenDataset(stem)[1]


def _with_end_of_text(stem: str) -> ByteTokenDataset:
    """The same data set as preprocessing writes it where each token item ends in the teacher's end-of-text id."""
    plain = ByteTokenDataset(stem)
    end = [plain.table.end_of_text_id]
    items = [[plain.table.start_id, *plain[index].tokens.tolist(), *end] for index in plain.documents]
    _replace_tokens(stem, items)
    path = StoredPaths(stem).manifest
    path.write_text(json.dumps(json.loads(path.read_text()) | {"append_eod": True}))
    return ByteTokenDataset(stem)


def test_a_stored_end_of_text_changes_no_document_and_no_row(
    store: Store, texts: list[str], sentencepiece_folder: Path
) -> None:
    for name, extra in (("no_bos", {}), ("bos", {"tokenizer_model": sentencepiece_folder})):
        stem = store(texts, name, **extra)
        plain = ByteTokenDataset(stem)
        documents = [plain[index] for index in plain.documents]
        streams = [RowStream([plain], row_bytes=64, chunk_bucket=8, seed=3)]
        rows = [streams[0].materialize(plan) for plan in streams[0].next_rows(200)]
        held_out = list(evaluation_rows(plain, row_bytes=48, chunk_bucket=8))
        marked = _with_end_of_text(stem)
        for index, document in enumerate(documents):
            assert marked.num_tokens(index) == document.tokens.size
            assert all(np.array_equal(a, b) for a, b in zip(marked[index], document, strict=True))
        stream = RowStream([marked], row_bytes=64, chunk_bucket=8, seed=3)
        found = [stream.materialize(plan) for plan in stream.next_rows(200)]
        found_held_out = list(evaluation_rows(marked, row_bytes=48, chunk_bucket=8))
        assert len(found_held_out) == len(held_out)
        for a, b in zip([*found, *found_held_out], [*rows, *held_out], strict=True):
            for field in fields(PackedRow):
                x, y = getattr(a, field.name), getattr(b, field.name)
                assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y


def test_a_missing_or_unexpected_end_of_text_is_refused(store: Store) -> None:
    stem = store(["ab", ""])
    marked = _with_end_of_text(stem)
    start, end = marked.table.start_id, marked.table.end_of_text_id
    tokens = marked[0].tokens.tolist()
    _replace_tokens(stem, [[start, *tokens, tokens[-1]], [start]])
    broken = ByteTokenDataset(stem)
    with pytest.raises(
        ValueError, match=rf"document 0 ends with token {tokens[-1]}, expected the end-of-text id {end}"
    ):
        broken[0]
    with pytest.raises(ValueError, match="document 1 has 1 elements, expected at least 2"):
        broken[1]
    _replace_tokens(stem, [[start, *tokens, end], [start, end]])
    path = StoredPaths(stem).manifest
    path.write_text(json.dumps(json.loads(path.read_text()) | {"append_eod": False}))
    for index in range(2):
        with pytest.raises(ValueError, match=rf"document {index} of .*special or unknown"):
            ByteTokenDataset(stem)[index]


def test_a_set_of_bytes_only_is_refused(store: Store) -> None:
    stem = store(["ab"])
    path = StoredPaths(stem).manifest
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_hash": NO_TOKENIZER, "vocab_size": 0}))
    with pytest.raises(ValueError, match=r"bytes only.*preprocess the text with the teacher's tokenizer"):
        ByteTokenDataset(stem)


def test_the_stem_is_explained() -> None:
    for stem in ("x", "x_text_document.bin"):
        with pytest.raises(ValueError, match=r"expected .*stem"):
            ByteTokenDataset(stem)


def test_a_manifest_of_another_version_is_refused(store: Store) -> None:
    stem = store(["a"])
    path = Path(stem + ".json")
    content = json.loads(path.read_text())
    for change in ({"schema_version": 99}, {"documents": "many"}, {"surprise": 1}):
        path.write_text(json.dumps(content | change))
        with pytest.raises(ValueError, match=r"set_text_document\.json"):
            ByteTokenDataset(stem)


def test_split_covers_every_document_once() -> None:
    for count in (0, 1, 2, 3, 10, 1000, 999_999):
        for split in ("969,30,1", "1", "0,1,0", "0.5,0.5", "1,1,1"):
            parts = split_documents(count, parse_split(split))
            assert [index for part in parts for index in (part.start, part.stop) if part][0:1] in ([], [0])
            assert sum(map(len, parts)) == count
            assert parts[0].stop == parts[1].start and parts[1].stop == parts[2].start and parts[2].stop == count
    assert split_documents(1000, parse_split("969,30,1")) == (range(0, 969), range(969, 999), range(999, 1000))


def test_a_part_of_a_blend_keeps_places_and_weights_and_may_lose_empty_sets(store: Store) -> None:
    blend = open_blend(["2", store(["x"] * 4, "a"), "1", store(["x"], "b")])
    assert blend.part(Part.VALIDATION, None) is blend
    halves = [blend.part(part, (0.5, 0.5, 0.0)) for part in Part]
    assert [[dataset.documents for dataset in half.datasets] for half in halves] == [
        [range(2), range(0)],
        [range(2, 4), range(0, 1)],
        [range(4, 4), range(1, 1)],
    ]
    assert halves[0].weights == [2.0, 1.0] and halves[0].without_empty() == ([halves[0].datasets[0]], [2.0])


def test_without_weights_a_set_counts_by_its_bytes(store: Store) -> None:
    a, b = store(["x" * 10], "a"), store(["x" * 30], "b")
    datasets, weights = open_blend([a, b])
    assert weights == [10.0, 30.0] and [len(dataset) for dataset in datasets] == [1, 1]
    assert open_blend(["2", a, "1", b]).weights == [2.0, 1.0]
    assert datasets[0].table is datasets[1].table, "data sets of one tokenizer share its table"
