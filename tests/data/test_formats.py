from __future__ import annotations

import errno
import tempfile
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megabyte_distill.data import formats
from megabyte_distill.data.formats import IndexedReader, IndexedWriter
from megabyte_distill.files import PARTIAL_SUFFIX

DTYPES = (np.uint8, np.uint16, np.int32)


def _items(dtype: type) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, np.iinfo(dtype).max, size=size).astype(dtype) for size in (3, 0, 1, 1000, 0)]


def _write(prefix: Path, items: list[np.ndarray], dtype: type) -> None:
    with IndexedWriter(prefix, dtype) as writer:
        for item in items:
            writer.add(item)
        writer.close()


@pytest.mark.parametrize("dtype", DTYPES)
def test_written_items_are_read_back(tmp_path: Path, dtype: type) -> None:
    items = _items(dtype)
    _write(tmp_path / "a", items, dtype)
    reader = IndexedReader(tmp_path / "a")
    reader.verify()
    assert reader.dtype == dtype and len(reader) == len(items)
    for index, item in enumerate(items):
        np.testing.assert_array_equal(reader.read(index), item)
    np.testing.assert_array_equal(reader.read(3, 10, 20), items[3][10:20])
    np.testing.assert_array_equal(reader.document_index, np.arange(len(items) + 1))


def _any_items(dtype: type) -> st.SearchStrategy[tuple[type, list[list[int]]]]:
    limits = np.iinfo(dtype)
    element = st.integers(int(limits.min), int(limits.max))
    return st.tuples(st.just(dtype), st.lists(st.lists(element, max_size=40), max_size=20))


@settings(deadline=None, derandomize=True)
@given(st.sampled_from(DTYPES).flatmap(_any_items), st.data())
def test_any_items_are_read_back_whole_and_in_part(case: tuple[type, list[list[int]]], data: Any) -> None:
    dtype, items = case
    with tempfile.TemporaryDirectory() as folder:
        _write(Path(folder) / "a", [np.array(item, dtype=dtype) for item in items], dtype)
        reader = IndexedReader(Path(folder) / "a")
        reader.verify()
        assert reader.dtype == dtype and [reader.read(index).tolist() for index in range(len(reader))] == items
        assert [reader.length(index) for index in range(len(reader))] == [len(item) for item in items]
        for index, item in enumerate(items):
            start, stop = sorted(data.draw(st.integers(0, len(item))) for _ in range(2))
            assert reader.read(index, start, stop).tolist() == item[start:stop]


def test_a_read_item_outlives_the_reader_and_is_its_own(tmp_path: Path) -> None:
    _write(tmp_path / "a", [np.arange(5, dtype=np.uint8)], np.uint8)
    reader = IndexedReader(tmp_path / "a")
    item = reader.read(0)
    del reader
    item[0] = 9
    assert item.flags.owndata and IndexedReader(tmp_path / "a").read(0)[0] == 0


@pytest.mark.parametrize("count", [0, 1])
def test_empty_sets_and_items(tmp_path: Path, count: int) -> None:
    _write(tmp_path / "a", [np.zeros(0, np.uint8)] * count, np.uint8)
    reader = IndexedReader(tmp_path / "a")
    reader.verify()
    assert len(reader) == count and all(reader.read(i).size == 0 for i in range(count))


@pytest.mark.parametrize("dtype", DTYPES)
def test_megatron_reads_ours(tmp_path: Path, dtype: type) -> None:
    indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset", reason="megatron-core is not installed")
    items = _items(dtype)
    _write(tmp_path / "a", items, dtype)
    theirs = indexed.IndexedDataset(str(tmp_path / "a"))
    assert len(theirs) == len(items)
    for index, item in enumerate(items):
        np.testing.assert_array_equal(np.array(theirs[index]), item)
    np.testing.assert_array_equal(np.array(theirs.document_indices), np.arange(len(items) + 1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_we_read_megatrons(tmp_path: Path, dtype: type) -> None:
    indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset", reason="megatron-core is not installed")
    torch = pytest.importorskip("torch")
    items = _items(dtype)
    builder = indexed.IndexedDatasetBuilder(str(tmp_path / "b.bin"), dtype=dtype)
    for item in items:
        builder.add_document(torch.from_numpy(item.astype(np.int64)), [item.size])
    builder.finalize(str(tmp_path / "b.idx"))
    ours = IndexedReader(tmp_path / "b")
    ours.verify()
    for index, item in enumerate(items):
        np.testing.assert_array_equal(ours.read(index), item)
    _write(tmp_path / "a", items, dtype)
    for ending in (".bin", ".idx"):
        assert (tmp_path / f"a{ending}").read_bytes() == (tmp_path / f"b{ending}").read_bytes()


@pytest.mark.parametrize("ending", [".bin", ".idx"])
@pytest.mark.parametrize("keep", [0, 5, 40, -1])
def test_a_truncated_file_is_named_with_both_sizes(tmp_path: Path, ending: str, keep: int) -> None:
    _write(tmp_path / "a", _items(np.int32), np.int32)
    path = tmp_path / f"a{ending}"
    whole = path.read_bytes()
    path.write_bytes(whole[:keep])
    with pytest.raises(ValueError) as error:
        IndexedReader(tmp_path / "a")
    message = str(error.value)
    assert str(path) in message and f"{len(whole[:keep])} bytes" in message and "expected" in message


def test_a_longer_bin_is_refused(tmp_path: Path) -> None:
    _write(tmp_path / "a", _items(np.uint8), np.uint8)
    with open(tmp_path / "a.bin", "ab") as stream:
        stream.write(b"x")
    with pytest.raises(ValueError, match=r"a\.bin: 1005 bytes, expected 1004"):
        IndexedReader(tmp_path / "a")


@pytest.mark.parametrize(("offset", "reason"), [(0, "starts with"), (9, "version"), (17, "dtype code")])
def test_a_damaged_header_is_refused(tmp_path: Path, offset: int, reason: str) -> None:
    _write(tmp_path / "a", _items(np.uint8), np.uint8)
    content = bytearray((tmp_path / "a.idx").read_bytes())
    content[offset] = 99
    (tmp_path / "a.idx").write_bytes(content)
    with pytest.raises(ValueError, match=reason):
        IndexedReader(tmp_path / "a")


def test_a_pointer_outside_the_data_is_an_error_not_a_crash(tmp_path: Path) -> None:
    _write(tmp_path / "a", _items(np.uint8), np.uint8)
    content = bytearray((tmp_path / "a.idx").read_bytes())
    start = 34 + 4 * 5
    content[start + 8 * 3 : start + 8 * 4] = (10**12).to_bytes(8, "little")
    (tmp_path / "a.idx").write_bytes(content)
    reader = IndexedReader(tmp_path / "a")
    with pytest.raises(ValueError, match="item 3"):
        reader.read(3)
    with pytest.raises(ValueError, match="item 3"):
        reader.verify()


def test_any_mutation_of_the_index_gives_an_error_or_a_read(tmp_path: Path) -> None:
    _write(tmp_path / "a", _items(np.uint16), np.uint16)
    content = (tmp_path / "a.idx").read_bytes()
    generator = np.random.default_rng(1)
    for _ in range(300):
        mutated = bytearray(content)
        mutated[int(generator.integers(len(content)))] = int(generator.integers(256))
        (tmp_path / "a.idx").write_bytes(mutated)
        try:
            reader = IndexedReader(tmp_path / "a")
            for index in range(len(reader)):
                reader.read(index)
        except ValueError:
            pass


def test_a_hundred_million_items_open_without_memory(tmp_path: Path) -> None:
    count = 100_000_000
    _write(tmp_path / "a", [], np.uint8)
    header = bytearray((tmp_path / "a.idx").read_bytes()[:34])
    header[18:34] = np.array([count, count + 1], dtype="<u8").tobytes()
    with open(tmp_path / "a.idx", "wb") as stream:
        stream.write(header)
        stream.truncate(34 + 12 * count + 8 * (count + 1))  # a hole: every length and offset is 0
    tracemalloc.start()
    try:
        reader = IndexedReader(tmp_path / "a")
        assert len(reader) == count and reader.length(count - 1) == 0 and reader.read(count // 2).size == 0
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()
    maps = Path("/proc/self/maps")
    assert not maps.exists() or str(tmp_path) not in maps.read_text(), "pages of a map would count as ours"
    with pytest.raises(IndexError, match=f"item {count} of {count}"):
        reader.length(count)


@pytest.mark.parametrize("ending", [".bin", ".idx"])
def test_a_file_that_shrinks_while_it_is_open_is_an_error_not_a_crash(tmp_path: Path, ending: str) -> None:
    _write(tmp_path / "a", _items(np.int32), np.int32)
    reader = IndexedReader(tmp_path / "a")
    (tmp_path / f"a{ending}").write_bytes(b"x" * 40)
    with pytest.raises(ValueError, match=rf"a\{ending}: ends at byte .*must not change"):
        reader.read(3)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere\.idx: no such file"):
        IndexedReader(tmp_path / "nowhere")


def test_nothing_has_its_final_name_before_the_end(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "a", np.uint8) as writer:
        writer.add(np.arange(3, dtype=np.uint8))
        writer.finish()
        assert sorted(path.name for path in tmp_path.iterdir()) == [f"a.bin{PARTIAL_SUFFIX}", f"a.idx{PARTIAL_SUFFIX}"]
        writer.publish()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx"]


def test_an_exception_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), IndexedWriter(tmp_path / "a", np.uint8) as writer:
        writer.add(np.arange(3, dtype=np.uint8))
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_values_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "a", np.uint8) as writer:
        with pytest.raises(ValueError, match="do not fit uint8"):
            writer.add(np.array([256]))
        writer.discard()
    with pytest.raises(ValueError, match="float32"):
        IndexedWriter(tmp_path / "a", np.float32)


def test_the_disk_is_told_early_and_its_error_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "_SYNC_BYTES", 100)
    synced: list[int] = []
    monkeypatch.setattr(formats.os, "fdatasync", synced.append)
    items = [np.full(40, number, dtype=np.uint8) for number in range(10)]
    with IndexedWriter(tmp_path / "a", np.uint8) as writer:
        for item in items:
            writer.add(item)
        writer.close()
    reader = IndexedReader(tmp_path / "a")
    assert synced and all(np.array_equal(reader.read(index), item) for index, item in enumerate(items))

    def fails(descriptor: int) -> None:
        raise OSError(errno.EIO, "the disk is broken")

    monkeypatch.setattr(formats.os, "fdatasync", fails)
    with pytest.raises(OSError, match="the disk is broken"), IndexedWriter(tmp_path / "b", np.uint8) as writer:
        for item in items:
            writer.add(item)
        writer.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx"]
