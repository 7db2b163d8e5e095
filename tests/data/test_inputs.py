"""Every kind of input gives the same documents, and what is damaged is named."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from megabyte_distill.data.formats import IndexedReader
from megabyte_distill.data.inputs import InputFormat, TextDocuments, find_inputs
from megabyte_distill.data.tokenizers import TokenizerKind
from tests.data.preprocessing import preprocess

ROOT = Path(__file__).resolve().parents[2]
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor(write_content_size=False).compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


def stored(tmp_path: Path, *inputs: Path | str, **settings: object) -> list[str]:
    """Documents that a data set of bytes alone holds afterwards."""
    settings = {"tokenizer_kind": TokenizerKind.NONE, "overwrite": True, **settings}
    stem = preprocess(list(inputs), output_prefix=tmp_path / "out" / "o", **settings).stems["text"]
    reader = IndexedReader(stem)
    return [reader.read(item, 1).tobytes().decode() for item in range(len(reader))]


def json_lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"id": 1, "text": text}, ensure_ascii=False) + "\n" for text in texts).encode()


def json_array(texts: list[str]) -> bytes:
    return json.dumps([{"text": text, "n": [1, {"text": "no"}]} for text in texts], indent=1).encode()


@pytest.mark.parametrize("ending", COMPRESS)
@pytest.mark.parametrize(
    ("format_ending", "write"), [(".jsonl", json_lines), (".json", json_lines), (".json", json_array)]
)
def test_json_in_every_compression_gives_the_same_documents(
    tmp_path: Path, texts: list[str], ending: str, format_ending: str, write: Callable[[list[str]], bytes]
) -> None:
    many = texts * 30  # several blocks
    source = tmp_path / f"a{format_ending}{ending}"
    source.write_bytes(COMPRESS[ending](write(many)))
    assert stored(tmp_path, source) == many


@pytest.mark.parametrize("ending", COMPRESS)
def test_several_compressed_members_are_read_to_the_last(tmp_path: Path, ending: str) -> None:
    source = tmp_path / f"a.jsonl{ending}"
    source.write_bytes(COMPRESS[ending](json_lines(["one", "two"])) + COMPRESS[ending](json_lines(["three"])))
    assert stored(tmp_path, source) == ["one", "two", "three"]


@pytest.mark.parametrize("ending", [ending for ending in COMPRESS if ending])
def test_a_truncated_archive_is_named(tmp_path: Path, ending: str) -> None:
    source = tmp_path / f"a.jsonl{ending}"
    source.write_bytes(COMPRESS[ending](json_lines([f"text {number}" for number in range(5000)]))[:-20])
    with pytest.raises(ValueError, match=rf"a\.jsonl\{ending}: cannot be read to its end"):
        stored(tmp_path, source)
    assert not list((tmp_path / "out").iterdir())


def test_text_is_a_document_a_file_or_a_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("one\r\n\n  \nzwei ü\n".encode())
    (tmp_path / "b.txt").write_bytes(b"three")
    both = [tmp_path / "a.txt", tmp_path / "b.txt"]
    assert stored(tmp_path, *both) == ["one\r\n\n  \nzwei ü\n", "three"]
    assert stored(tmp_path, *both, text_documents=TextDocuments.LINE) == ["one\r", "  ", "zwei ü", "three"]


def test_lines_longer_than_a_block_and_no_last_newline(tmp_path: Path) -> None:
    lines = ["x" * 3_000_000, "", "é" * 700_000, "end"]
    (tmp_path / "a.txt").write_text("\n".join(lines), encoding="utf-8")
    assert stored(tmp_path, tmp_path / "a.txt", text_documents=TextDocuments.LINE) == [lines[0], lines[2], lines[3]]


def test_an_element_longer_than_a_block_is_read(tmp_path: Path) -> None:
    texts = ["short", 'é\\"' * 900_000, "", "last"]
    (tmp_path / "a.json").write_bytes(json_array(texts))
    assert stored(tmp_path, tmp_path / "a.json") == texts


@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.large_string(), pyarrow.binary(), "dictionary"])
def test_parquet_columns_are_read(tmp_path: Path, texts: list[str], kind: object) -> None:
    column = pyarrow.array(texts)
    column = column.dictionary_encode() if kind == "dictionary" else column.cast(kind)
    table = pyarrow.table({"n": list(range(len(texts))), "text": column})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=7)
    assert stored(tmp_path, tmp_path / "a.parquet") == texts


def test_bad_parquet_is_named(tmp_path: Path) -> None:
    source = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None], "n": [1, 2]}), source)
    with pytest.raises(ValueError, match=r"a\.parquet, row 2: 'text' is null"):
        stored(tmp_path, source)
    with pytest.raises(ValueError, match=r"a\.parquet: no column 'body'; it has 'text', 'n'"):
        stored(tmp_path, source, json_keys=("body",))
    with pytest.raises(ValueError, match=r"a\.parquet: column 'n' is int64, expected text"):
        stored(tmp_path, source, json_keys=("n",))
    source.write_bytes(source.read_bytes()[:-6])
    with pytest.raises(ValueError, match=r"a\.parquet: cannot be read as parquet"):
        stored(tmp_path, source)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"text": "a"}', "ends without its closing bracket"),
        (b'[{"text": "a"}, {"text": "b', r"element 2: the array ends without"),
        (b'[{"text": "a"} {"text": "b"}]', "behind element 1: expected a comma"),
        (b'[{"text": "a"}, {text: "b"}]' + b" " * 100, "element 2: invalid JSON"),
        (b'[{"text": "a"}] x', "behind the array's closing bracket"),
        (b'[{"text": "a"}, 7]', "element 2: expected a JSON object, got int"),
        (b'[{"text": "a"}, {"text": "\xff"}]', "element 2: invalid UTF-8 at byte 10"),
    ],
)
def test_a_bad_array_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        stored(tmp_path, tmp_path / "a.json")


def test_an_empty_array_and_empty_files_hold_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b" [ ] \n")
    (tmp_path / "b.jsonl").write_bytes(b"")
    (tmp_path / "c.json").write_bytes(b"")
    assert stored(tmp_path, tmp_path / "a.json", tmp_path / "b.jsonl", tmp_path / "c.json") == []


def test_directories_and_globs_are_sorted_and_unknown_files_are_passed_over(tmp_path: Path) -> None:
    folder = tmp_path / "in" / "deep"
    folder.mkdir(parents=True)
    (tmp_path / "in" / "z.txt").write_text("z")
    (folder / "a.txt").write_text("a")
    (folder / "readme.md").write_text("no")
    assert stored(tmp_path, tmp_path / "in") == ["a", "z"]
    assert stored(tmp_path, tmp_path / "in", input_format=InputFormat.TEXT) == ["a", "no", "z"]
    assert stored(tmp_path, str(tmp_path / "in" / "*.txt"), str(folder / "*.txt")) == ["z", "a"]
    (folder / "a.txt").unlink()
    (tmp_path / "in" / "z.txt").unlink()
    with pytest.raises(ValueError, match="no file under it ends in"):
        find_inputs([tmp_path / "in"])


def test_a_file_that_comes_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ValueError, match="comes twice"):
        find_inputs([tmp_path / "a.txt", str(tmp_path / "*.txt")])


def test_an_unreadable_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines(["a"]))

    def refuse(*arguments: object, **more: object) -> io.RawIOBase:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("megabyte_distill.data.compressed.open", refuse, raising=False)
    with pytest.raises(ValueError, match=r"a\.jsonl: cannot be read to its end .*Permission denied"):
        stored(tmp_path, tmp_path / "a.jsonl")


@pytest.mark.parametrize("ending", COMPRESS)
def test_standard_input_is_read_whatever_its_compression(tmp_path: Path, texts: list[str], ending: str) -> None:
    command = [sys.executable, "tools/preprocess_bytes.py", "--input", "-", "--tokenizer-type", "none"]
    done = subprocess.run(
        [*command, "--output-prefix", str(tmp_path / "o")],
        input=COMPRESS[ending](json_lines(texts)),
        capture_output=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    reader = IndexedReader(tmp_path / "o_text_document")
    assert [reader.read(item, 1).tobytes().decode() for item in range(len(reader))] == texts
