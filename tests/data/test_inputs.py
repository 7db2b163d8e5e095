"""Every kind of input gives the same documents, and what is damaged is named."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import json
import lzma
import os
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from megabyte_distill.data.compressed import BLOCK_BYTES, blocks, opened
from megabyte_distill.data.formats import IndexedReader
from megabyte_distill.data.inputs import InputFormat, TextDocuments, find_inputs
from megabyte_distill.data.read_ahead import read_ahead
from megabyte_distill.data.readers import RawBatch, ReadProgress, read_batches
from megabyte_distill.data.tokenizers import TokenizerKind
from megabyte_distill.data.zstd_frames import ZstdFrames
from tests.data.preprocessing import preprocess

ROOT = Path(__file__).resolve().parents[2]
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor(write_content_size=False).compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}
ARCHIVES = [ending for ending in COMPRESS if ending]
SKIPPABLE = b"\x5a\x2a\x4d\x18\x03\x00\x00\x00abc"
"""A zstd frame without content, as parallel compressors write."""


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


@pytest.mark.parametrize("ending", ARCHIVES)
def test_a_damaged_later_member_is_named(tmp_path: Path, ending: str) -> None:
    first, second = (COMPRESS[ending](json_lines([text] * 200)) for text in ("one", "two"))
    damaged = bytearray(second)
    damaged[0] ^= 0xFF
    source = tmp_path / f"a.jsonl{ending}"
    for rest in (bytes(damaged), second[:-5], b"more", b"x"):
        source.write_bytes(first + rest)
        with pytest.raises(ValueError, match=rf"a\.jsonl\{ending}: cannot be read to its end"):
            stored(tmp_path, source)


@pytest.mark.parametrize(
    ("ending", "padding", "is_legal"),
    [
        (".xz", b"\0" * 8, True),
        (".xz", b"\0" * 6, False),
        (".gz", b"\0" * 3, True),
        (".bz2", b"\0" * 4, False),
        (".zst", b"\0" * 4, False),
        (".zst", SKIPPABLE, True),
        (".zst", SKIPPABLE[:-1], False),
    ],
)
def test_padding_behind_members_is_read_where_the_format_has_it(
    tmp_path: Path, ending: str, padding: bytes, is_legal: bool
) -> None:
    one, two = (COMPRESS[ending](json_lines([text])) for text in ("one", "two"))
    source = tmp_path / f"a.jsonl{ending}"
    for content, texts in ((one + padding + two, ["one", "two"]), (one + padding, ["one"])):
        source.write_bytes(content)
        if is_legal:
            assert stored(tmp_path, source) == texts
        else:
            with pytest.raises(ValueError, match="cannot be read to its end"):
                stored(tmp_path, source)


@pytest.mark.parametrize("ending", ARCHIVES)
def test_an_archive_of_nothing_is_read_and_an_empty_file_is_none(tmp_path: Path, ending: str) -> None:
    source = tmp_path / f"a.jsonl{ending}"
    source.write_bytes(COMPRESS[ending](b"") + COMPRESS[ending](json_lines(["one"])) + COMPRESS[ending](b""))
    assert stored(tmp_path, source) == ["one"]
    source.write_bytes(b"")
    with pytest.raises(ValueError, match=r"cannot be read to its end \(empty, expected a \w+ stream\)"):
        stored(tmp_path, source)


@pytest.mark.parametrize("checksum", [False, True])
@pytest.mark.parametrize("knows_size", [False, True])
@pytest.mark.parametrize("text", [b"", b"a\n", os.urandom(200).hex().encode()])
def test_a_zstd_file_cut_anywhere_is_an_error(tmp_path: Path, text: bytes, knows_size: bool, checksum: bool) -> None:
    compressor = zstandard.ZstdCompressor(write_checksum=checksum, write_content_size=knows_size)
    frame = compressor.compress(text)
    for whole in (b"", frame, frame + frame):
        for length in range(0 if not whole else 1, len(frame)):
            file = io.BufferedReader(io.BytesIO(whole + frame[:length]))  # type: ignore[type-var]
            with pytest.raises((EOFError, zstandard.ZstdError)):
                content = ZstdFrames(file)
                while content.read(1 << 16):
                    pass
        file = io.BufferedReader(io.BytesIO(whole + frame))  # type: ignore[type-var]
        content, got = ZstdFrames(file), b""
        while piece := content.read(7):
            got += piece
        assert got == text * (1 + len(whole) // len(frame))


@pytest.mark.parametrize("ending", ARCHIVES)
def test_a_bomb_is_read_in_blocks(tmp_path: Path, ending: str) -> None:
    members = 32 if ending == ".bz2" else 1  # it is slow to compress repetition
    text = b"2024-01-01 INFO nothing happened\n" * ((48 << 15) // members)
    (tmp_path / f"a.jsonl{ending}").write_bytes(COMPRESS[ending](text) * members)
    text *= members
    [file] = find_inputs([tmp_path])
    wanted = hashlib.sha256(text).hexdigest()
    size = len(text)
    del text
    got, longest, count = hashlib.sha256(), 0, 0
    tracemalloc.start()
    with opened(file) as (_, _, stream):
        for block in blocks(stream):
            for piece in block:
                got.update(piece)
            size_of_block = sum(map(len, block))
            longest, count = max(longest, size_of_block), count + size_of_block
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (got.hexdigest(), count) == (wanted, size)
    assert longest < 2 * BLOCK_BYTES and peak < 32 * BLOCK_BYTES < size


@pytest.mark.parametrize("ending", ARCHIVES)
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
    (tmp_path / "c.txt").write_bytes(b"\r\n\na\r\n\r\n\n\nb\n\r")
    assert stored(tmp_path, tmp_path / "c.txt", text_documents=TextDocuments.LINE) == ["a\r", "b"]
    (tmp_path / "c.txt").write_bytes(b"\n\r\n\n")
    assert stored(tmp_path, tmp_path / "c.txt", text_documents=TextDocuments.LINE) == []


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


def test_long_parquet_rows_come_in_small_batches_and_the_count_of_bytes_follows(tmp_path: Path) -> None:
    long = [os.urandom(150_000).hex() for _ in range(40)]
    texts = [text for row in long for text in (*["short"] * 100, row)]
    source = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": texts, "n": texts}), source, row_group_size=1000)
    progress, read, first = ReadProgress(), [], 1
    passed = []
    for batch in read_batches(find_inputs([source]), ["text", "n"], progress):
        assert batch.first == first and batch.where(0) == f"{source}, row {first}"
        assert sum(len(text) for row in batch.records for text in row) < 3 * BLOCK_BYTES
        read += [row[0].decode() for row in batch.records]
        first += len(batch.records)
        passed.append(progress.raw_bytes)
    assert read == texts
    size = source.stat().st_size
    assert passed == sorted(passed) and len({10 * place // size for place in passed}) >= 9
    assert progress.raw_bytes == size
    assert progress.finished[0]["sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()


def test_parquet_without_rows_holds_nothing(tmp_path: Path) -> None:
    schema = pyarrow.schema([("text", pyarrow.string())])
    with pyarrow.parquet.ParquetWriter(tmp_path / "a.parquet", schema) as writer:
        for texts in ([], ["one"], []):
            writer.write_table(pyarrow.table({"text": texts}, schema=schema))
    assert stored(tmp_path, tmp_path / "a.parquet") == ["one"]
    pyarrow.parquet.write_table(pyarrow.table({"text": []}, schema=schema), tmp_path / "a.parquet")
    assert stored(tmp_path, tmp_path / "a.parquet") == []


def test_compressed_parquet_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.parquet.zst").write_bytes(COMPRESS[".zst"](b"PAR1"))
    with pytest.raises(ValueError, match="a parquet file is read from its end; give it uncompressed"):
        stored(tmp_path, tmp_path / "a.parquet.zst")


def test_bad_parquet_is_named(tmp_path: Path) -> None:
    source = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None], "n": [1, 2]}), source)
    with pytest.raises(ValueError, match=r"a\.parquet, row 2: 'text' is null"):
        stored(tmp_path, source)
    double = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, names=["text", "text"])
    pyarrow.parquet.write_table(double, tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"b\.parquet: 2 columns 'text'; it has"):
        stored(tmp_path, tmp_path / "b.parquet")
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
        (b'[{"text": "a"}, {"text": [1]', r"element 2: the array ends without"),
        (b'[{"text": "a"}, {"text": 1, \n', r"element 2: the array ends without"),
        (b'[{"text": "a"},]', r"element 2: invalid JSON \(Expecting value\)$"),
        (b'[{"text":"a"},{text:1}]\n', r"element 2: invalid JSON \(Expecting property name.*\)$"),
        (b'[{"text":"a"},{text:1}', r"element 2: invalid JSON \(Expecting property name.*\); the array ends without"),
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


def test_a_pattern_that_gives_nothing_is_named_beside_one_that_does(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"--input .*/empty: no file under it ends in"):
        find_inputs([tmp_path / "a.txt", tmp_path / "empty"])


def test_links_below_a_directory_are_followed_but_not_in_a_circle(tmp_path: Path) -> None:
    (tmp_path / "shards" / "deep").mkdir(parents=True)
    (tmp_path / "shards" / "deep" / "b.txt").write_text("b")
    (tmp_path / "one.txt").write_text("one")
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "linked").symlink_to(tmp_path / "shards")
    (folder / "a.txt").symlink_to(tmp_path / "one.txt")
    (tmp_path / "shards" / "deep" / "back").symlink_to(folder)
    (folder / "self").symlink_to("self")
    (folder / "nothing.md").symlink_to(tmp_path / "gone.md")
    assert [file.path for file in find_inputs([folder])] == [f"{folder}/a.txt", f"{folder}/linked/deep/b.txt"]
    (folder / "z.jsonl").symlink_to(tmp_path / "gone.jsonl")
    for pattern in (folder, folder / "z.jsonl", str(folder / "*.jsonl")):
        with pytest.raises(ValueError, match=r"z\.jsonl: a link to a file that is not there"):
            find_inputs([pattern])


def test_a_file_that_comes_twice_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.txt").symlink_to("../a.txt")
    monkeypatch.chdir(tmp_path)
    for again in (str(tmp_path / "*.txt"), "./a.txt", "sub/../a.txt", "sub/b.txt", "sub"):
        with pytest.raises(ValueError, match=r"comes twice"):
            find_inputs(["a.txt", again])


def test_a_name_that_is_no_utf8_is_refused(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.txt")
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / os.fsdecode(b"caf\xe9.md")).write_text("passed over")
    assert len(find_inputs([tmp_path])) == 1
    (tmp_path / name).write_text("a")
    for pattern in (tmp_path, tmp_path / name):
        with pytest.raises(ValueError, match=r"caf\\xe9\.txt: the file's name is no UTF-8") as refused:
            find_inputs([pattern])
        str(refused.value).encode()


def test_what_a_run_wrote_is_left_out_unless_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = ["a.jsonl", "o.jsonl", "o_de.jsonl", "other_text_document.json", "sub/o_text_document.json"]
    written = ["o_text_document.json", "o.part-00000-of-00002_text_document.json", "o_text_tokens.bin"]
    for name in (*kept, *written):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    monkeypatch.chdir(tmp_path)
    for prefix in ("o", "./o", str(tmp_path / "o"), "sub/../o"):
        for pattern in (".", str(tmp_path), "**/*.*"):
            found = find_inputs([pattern], input_format=InputFormat.TEXT, leave_out=prefix)
            assert {os.path.relpath(file.path) for file in found} == set(kept)
    assert [file.path for file in find_inputs([written[0]], leave_out="o")] == [written[0]]
    assert len(find_inputs(["*.json"])) == 3
    with pytest.raises(ValueError, match=r"no file under it ends in .* \(but for what a run wrote to o\)"):
        find_inputs(["o_*.json"], leave_out="o")


def test_a_file_that_comes_again_by_another_name_is_shown_with_both(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").symlink_to("a.txt")
    with pytest.raises(ValueError, match=r"b\.txt comes twice \(as .*a\.txt\)"):
        find_inputs([tmp_path])


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


@pytest.mark.parametrize("ending", COMPRESS)
def test_standard_input_that_comes_byte_by_byte_is_read(monkeypatch: pytest.MonkeyPatch, ending: str) -> None:
    end, start = os.pipe()
    content = COMPRESS[ending](json_lines(["a", "b"]))

    def write() -> None:
        for byte in content[:12]:
            os.write(start, bytes([byte]))
            time.sleep(0.02)
        os.write(start, content[12:])
        os.close(start)

    with open(end) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        threading.Thread(target=write).start()
        progress = ReadProgress()
        [batch] = read_batches(find_inputs(["-"]), ["text"], progress)
    assert [json.loads(line)["text"] for line in batch.payloads()] == ["a", "b"]
    assert progress.finished[0]["sha256"] == hashlib.sha256(content).hexdigest()


def test_a_reader_that_stops_waits_for_no_pipe(tmp_path: Path) -> None:
    pipe = tmp_path / "a.txt"
    os.mkfifo(pipe)
    writer = os.open(pipe, os.O_RDWR)
    [file] = find_inputs([pipe], text_documents=TextDocuments.LINE)

    def read_one_batch() -> None:
        batches = read_ahead(read_batches([file], ["text"], ReadProgress()), RawBatch.size, may_wait=file.may_wait)
        next(batches)
        batches.close()

    thread = threading.Thread(target=read_one_batch, daemon=True)
    thread.start()
    os.write(writer, b"a\n" * (BLOCK_BYTES // 2 + 9))  # a block is whole, the next one waits
    thread.join(20)
    is_stuck = thread.is_alive()
    os.close(writer)
    assert not is_stuck


def test_ctrl_c_ends_a_run_whose_standard_input_stays_open(tmp_path: Path) -> None:
    command = [sys.executable, "tools/preprocess_bytes.py", "--input", "-", "--tokenizer-type", "none"]
    run = subprocess.Popen(
        [*command, "--output-prefix", str(tmp_path / "o")],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert run.stdin is not None and run.stderr is not None
    try:
        run.stdin.write(json_lines(["a" * 100] * 20_000))  # more than a block
        run.stdin.flush()
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("o*.partial")) and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.5)  # now it waits for more
        run.send_signal(signal.SIGINT)
        assert run.wait(30) == 130, run.stderr.read()
        assert b"Fatal" not in run.stderr.read() and not list(tmp_path.glob("o*.partial"))
    finally:
        run.kill()
        run.communicate()
