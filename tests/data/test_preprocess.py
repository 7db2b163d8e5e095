from __future__ import annotations

import errno
import gzip
import hashlib
import json
import lzma
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megabyte_distill.data import dataset_writer, tokenizers
from megabyte_distill.data.dataset import ByteTokenDataset
from megabyte_distill.data.formats import IndexedReader
from megabyte_distill.data.manifest import StoredPaths
from megabyte_distill.data.preprocess import iterate_texts
from megabyte_distill.data.records import OnInvalid
from megabyte_distill.data.tokenizers import DocumentTokenizer, TokenizerKind
from megabyte_distill.data.verify import verify_dataset
from tests.data.preprocessing import preprocess


def _lines(texts: list[str], key: str = "text") -> bytes:
    return "".join(json.dumps({key: text, "id": 1}, ensure_ascii=False) + "\n" for text in texts).encode()


def test_every_kind_of_tokenizer_stores_every_text(
    tmp_path: Path, texts: list[str], tokenizer: DocumentTokenizer
) -> None:
    (tmp_path / "a.jsonl").write_bytes(_lines(texts))
    summary = preprocess([str(tmp_path / "a.jsonl")], output_prefix=tmp_path / "o", tokenizer_model=tokenizer.path)
    dataset = ByteTokenDataset(summary.stems["text"])
    documents = [tokenizer.normalize(text) for text in texts]
    assert [dataset[index].byte_ids.tobytes() for index in dataset.documents] == [text.encode() for text in documents]
    assert summary.documents == len(texts) and summary.bytes == sum(len(text.encode()) for text in documents)
    assert summary.tokens == sum(dataset[index].tokens.size for index in dataset.documents)
    changed = sum(a != b for a, b in zip(texts, documents, strict=True))
    assert changed and summary.normalized_documents == dataset.manifest.normalized_documents == changed


def test_compressed_globs_and_text_files_keep_their_order(tmp_path: Path, byte_level_folder: Path) -> None:
    (tmp_path / "a1.jsonl.gz").write_bytes(gzip.compress(_lines(["one", "two"])))
    (tmp_path / "a2.jsonl.xz").write_bytes(lzma.compress(_lines(["three"])))
    (tmp_path / "z.txt").write_text("four\nlines\n")
    (tmp_path / "y.txt.xz").write_bytes(lzma.compress(b""))
    inputs = [str(tmp_path / "z.txt"), str(tmp_path / "a*"), str(tmp_path / "y.txt.xz")]
    summary = preprocess(inputs, output_prefix=tmp_path / "sub" / "o", tokenizer_model=byte_level_folder)
    dataset = ByteTokenDataset(summary.stems["text"])
    found = [dataset[index].byte_ids.tobytes() for index in dataset.documents]
    assert [text.encode() for text in iterate_texts(inputs)] == found
    assert found == [b"four\nlines\n", b"one", b"two", b"three", b""]


def test_manifest_says_what_went_in(tmp_path: Path, byte_level_folder: Path) -> None:
    content = gzip.compress(_lines(["one", "two"]) + b"\n  \n") + gzip.compress(_lines(["three"]))
    source = tmp_path / "a.jsonl.gz"
    source.write_bytes(content)
    summary = preprocess([str(source)], output_prefix=tmp_path / "o", tokenizer_model=byte_level_folder)
    manifest = ByteTokenDataset(summary.stems["text"]).manifest
    assert manifest.inputs == (
        {"path": str(source), "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()},
    )
    assert (manifest.documents, manifest.bytes, manifest.skipped) == (3, 11, {"blank lines": 2})
    assert manifest.vocab_size == tokenizers.load(byte_level_folder).token_bytes.vocab_size
    assert manifest.versions["megabyte-distill"] and "2 blank lines" in str(summary)


def test_several_keys_are_several_sets(tmp_path: Path, byte_level_folder: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "t", "title": "longer"}\n')
    arguments = {"output_prefix": tmp_path / "o", "tokenizer_model": byte_level_folder, "json_keys": ("text", "title")}
    summary = preprocess([str(tmp_path / "a.jsonl")], **arguments)
    assert list(summary.stems) == ["text", "title"] and summary.documents == 2
    assert ByteTokenDataset(summary.stems["title"])[0].byte_ids.tobytes() == b"longer"
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match="has no keys text title"):
        preprocess([str(tmp_path / "a.txt")], **arguments)


def test_workers_change_nothing(tmp_path: Path, byte_level_folder: Path, texts: list[str]) -> None:
    (tmp_path / "a.jsonl").write_bytes(_lines([f"{number} {text}" for number, text in enumerate(texts * 300)]))
    assert (tmp_path / "a.jsonl").stat().st_size > 4 << 20, "several batches"
    for workers in (1, 2):
        source = [str(tmp_path / "a.jsonl")]
        preprocess(source, output_prefix=tmp_path / f"o{workers}", tokenizer_model=byte_level_folder, workers=workers)
    one, two = (StoredPaths.of(tmp_path / f"o{workers}", "text") for workers in (1, 2))
    for a, b in ((one.byte_prefix, two.byte_prefix), (one.token_prefix, two.token_prefix)):
        for ending in (".bin", ".idx"):
            assert Path(f"{a}{ending}").read_bytes() == Path(f"{b}{ending}").read_bytes()
    assert one.manifest.read_bytes() == two.manifest.read_bytes()


def test_progress_is_reported(tmp_path: Path, byte_level_folder: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(_lines(["some text " * 100] * 5000))
    lines: list[str] = []
    arguments = {"output_prefix": tmp_path / "o", "tokenizer_model": byte_level_folder, "report": lines.append}
    preprocess([str(tmp_path / "a.jsonl")], log_interval=2000, **arguments)
    assert lines[0].startswith("tokenizer: ")
    shown = re.compile(r"Processed (\d+) documents \([\d.]+ docs/s, [\d.]+ MB/s, \d+ %, ETA \d:\d\d:\d\d\)\.")
    assert all(shown.fullmatch(line) for line in lines[1:]), lines
    assert [int(line.split()[1]) // 2000 for line in lines[1:]] == [1, 2]


BAD_LINES = [
    (b"{broken", "invalid JSON"),
    (b"[1, 2]", "expected a JSON object, got list"),
    (b'{"txt": "a", "b": 1}', "no key 'text'; it has 'txt', 'b'"),
    (b'{"text": 5}', "'text' is int, expected text"),
    (b'{"text": null}', "'text' is NoneType"),
    (b'{"text": "\xff"}', "invalid UTF-8 at byte 10"),
    (b'{"text": "\\ud800"}', "'text' has half a surrogate pair"),
    (b"[" * 100_000, "invalid JSON"),
]


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(("line", "reason"), BAD_LINES[:1] + BAD_LINES[5:6])
def test_a_bad_line_stops_any_number_of_workers(
    tmp_path: Path, byte_level_folder: Path, workers: int, line: bytes, reason: str
) -> None:
    (tmp_path / "a.jsonl").write_bytes(_lines(["x"] * 4500) + line + b"\n" + _lines(["x"] * 4500))
    arguments = {"output_prefix": tmp_path / "o", "tokenizer_model": byte_level_folder, "workers": workers}
    with pytest.raises(ValueError, match=f"a.jsonl, line 4501: {reason}"):
        preprocess([str(tmp_path / "a.jsonl")], **arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize(("line", "reason"), BAD_LINES)
def test_bad_lines_are_named_and_leave_no_files(
    tmp_path: Path, byte_level_folder: Path, line: bytes, reason: str
) -> None:
    (tmp_path / "a.jsonl").write_bytes(_lines(["fine", "x"]) + b"\n" + line + b"\n")
    with pytest.raises(ValueError, match=f"a.jsonl, line 4: {reason}"):
        preprocess([str(tmp_path / "a.jsonl")], output_prefix=tmp_path / "o", tokenizer_model=byte_level_folder)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_bad_files_are_named(tmp_path: Path, byte_level_folder: Path) -> None:
    def run(name: str, content: bytes) -> None:
        (tmp_path / name).write_bytes(content)
        preprocess([str(tmp_path / name)], output_prefix=tmp_path / "o", tokenizer_model=byte_level_folder)

    with pytest.raises(ValueError, match=r"a\.txt: invalid UTF-8 at byte 3, line 2"):
        run("a.txt", b"ab\n\xff")
    with pytest.raises(ValueError, match=r"b\.jsonl\.gz: cannot be read to its end"):
        run("b.jsonl.gz", gzip.compress(_lines(["x" * 1000]))[:-9])
    with pytest.raises(ValueError, match=r"c\.jsonl\.xz: cannot be read to its end"):
        run("c.jsonl.xz", b"no archive")
    with pytest.raises(ValueError, match=r"d\.html: unknown kind of input"):
        run("d.html", b"")
    with pytest.raises(ValueError, match=r"e\*\.jsonl: no such file"):
        preprocess([str(tmp_path / "e*.jsonl")], output_prefix=tmp_path / "o", tokenizer_model=byte_level_folder)


def test_a_document_that_does_not_rebuild_is_left_out_and_named_or_an_error(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE({"a": 0, "</s>": 1, "[UNK]": 2}, [], unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.jsonl").write_bytes(_lines(["aa", "aab", "a"]))
    arguments = {"output_prefix": tmp_path / "o", "tokenizer_model": tmp_path}
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: its tokens do not rebuild.*byte 2.*special or unknown"):
        preprocess([str(tmp_path / "a.jsonl")], strict=True, **arguments)
    summary = preprocess([str(tmp_path / "a.jsonl")], **arguments)
    dataset = ByteTokenDataset(summary.stems["text"])
    assert [dataset[index].byte_ids.tobytes() for index in dataset.documents] == [b"aa", b"a"]
    assert summary.skipped == {"tokens do not rebuild it": 1} == dataset.manifest.skipped
    assert dataset.manifest.skipped_at == {"tokens do not rebuild it": [f"{tmp_path / 'a.jsonl'}, line 2, byte 2"]}
    assert "a.jsonl, line 2, byte 2" in str(summary)


def test_an_existing_set_is_replaced_only_on_request(tmp_path: Path, store: Callable[..., str]) -> None:
    stem = store(["old"])
    with pytest.raises(ValueError, match=r"exists; choose another --output-prefix, pass --resume to go on"):
        store(["new"])
    assert ByteTokenDataset(stem)[0].byte_ids.tobytes() == b"old"


def test_overwriting_leaves_a_set_or_none(
    tmp_path: Path, byte_level_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "a.jsonl"
    arguments = {"output_prefix": tmp_path / "o", "tokenizer_model": byte_level_folder, "overwrite": True}
    source.write_bytes(_lines(["old"]))
    stem = preprocess([str(source)], **arguments).stems["text"]
    source.write_bytes(_lines(["new", "more"]))

    real, calls = dataset_writer.publish, []

    def stop_at_the_manifest(path: Path) -> None:
        calls.append(path)
        if path.suffix == ".json":
            raise OSError("the machine stops here")
        real(path)

    with monkeypatch.context() as patch:
        patch.setattr(dataset_writer, "publish", stop_at_the_manifest)
        with pytest.raises(OSError, match="stops here"):
            preprocess([str(source)], **arguments)
    assert calls
    with pytest.raises(ValueError, match=r"\.idx: no such file"):
        ByteTokenDataset(stem)
    preprocess([str(source)], **arguments)
    assert ByteTokenDataset(stem)[1].byte_ids.tobytes() == b"more"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 0, "log_interval": 0}, "--workers 0: expected at least 1; --log-interval 0"),
        ({"json_keys": ()}, "expected different keys"),
        ({"json_keys": ("a", "a")}, "expected different keys"),
        ({"partitions": 2, "partition_index": 2}, "--partition-index 2: expected 0 … 1"),
        ({"resume": True, "overwrite": True}, "contradict each other"),
        ({"tokenizer_model": ""}, "--tokenizer-model is missing"),
        ({"tokenizer_kind": TokenizerKind.NONE}, "does not look at --tokenizer-model"),
        ({"tokenizer_kind": TokenizerKind.NONE, "tokenizer_model": "", "append_eod": True}, "--append-eod ends token"),
        ({"partitions": 3}, "--partitions 3 of 1 input files"),
    ],
)
def test_bad_settings_are_refused(
    tmp_path: Path, byte_level_folder: Path, options: dict[str, object], message: str
) -> None:
    (tmp_path / "a.jsonl").write_bytes(_lines(["x"]))
    arguments = {"output_prefix": tmp_path / "o", "tokenizer_model": byte_level_folder, **options}
    with pytest.raises(ValueError, match=re.escape(message)):
        preprocess([str(tmp_path / "a.jsonl")], **arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize(
    ("line", "reason"), [(line, reason) for line, reason in BAD_LINES if "UTF-8" in reason or "surrogate" in reason]
)
def test_broken_text_is_left_out_or_replaced_as_asked(
    tmp_path: Path, byte_level_folder: Path, line: bytes, reason: str
) -> None:
    source = tmp_path / "a.jsonl"
    source.write_bytes(_lines(["fine"]) + line + b"\n" + _lines(["too"]))
    arguments = {"tokenizer_model": byte_level_folder}
    skipped = preprocess([source], output_prefix=tmp_path / "s", on_invalid=OnInvalid.SKIP, **arguments)
    assert skipped.documents == 2 and skipped.skipped == {"invalid UTF-8": 1}
    assert skipped.skipped_at == {"invalid UTF-8": [f"{source}, line 2"]}
    replaced = preprocess([source], output_prefix=tmp_path / "r", on_invalid=OnInvalid.REPLACE, **arguments)
    dataset = ByteTokenDataset(replaced.stems["text"])
    found = [dataset[index].byte_ids.tobytes().decode() for index in dataset.documents]
    assert found == ["fine", "\ufffd", "too"]


def test_records_that_are_wrong_otherwise_are_left_out_by_reason(tmp_path: Path, byte_level_folder: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_bytes(b"\n".join(line for line, _ in BAD_LINES) + b"\n" + _lines(["last"]))
    summary = preprocess(
        [source], output_prefix=tmp_path / "o", tokenizer_model=byte_level_folder, on_invalid=OnInvalid.SKIP
    )
    assert summary.documents == 1
    assert summary.skipped == {"invalid JSON": 3, "invalid UTF-8": 2, "missing key": 1, "not a text": 2}


def test_bytes_alone_are_stored_without_a_tokenizer(tmp_path: Path, texts: list[str]) -> None:
    (tmp_path / "a.jsonl").write_bytes(_lines(texts))
    settings = {"tokenizer_kind": TokenizerKind.NONE}
    summary = preprocess([tmp_path / "a.jsonl"], output_prefix=tmp_path / "o", **settings)
    stem = summary.stems["text"]
    assert verify_dataset(stem).documents == len(texts) and summary.tokens == 0
    reader = IndexedReader(stem)
    assert [reader.read(item, 1).tobytes().decode() for item in range(len(reader))] == texts
    with pytest.raises(ValueError, match="bytes only"):
        ByteTokenDataset(stem)


def test_append_eod_ends_each_token_item(tmp_path: Path, byte_level_folder: Path, texts: list[str]) -> None:
    (tmp_path / "a.jsonl").write_bytes(_lines(texts))
    plain, ended = (
        preprocess(
            [tmp_path / "a.jsonl"],
            output_prefix=tmp_path / f"o{append_eod}",
            tokenizer_model=byte_level_folder,
            append_eod=append_eod,
        ).stems["text"]
        for append_eod in (False, True)
    )
    assert verify_dataset(ended).append_eod and not verify_dataset(plain).append_eod
    without, with_end = (IndexedReader(StoredPaths(stem).token_prefix) for stem in (plain, ended))
    end = ByteTokenDataset(ended).table.end_of_text_id
    for item in range(len(texts)):
        assert with_end.read(item).tolist() == [*without.read(item).tolist(), end]


def test_two_runs_do_not_write_the_same_prefix(tmp_path: Path, byte_level_folder: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(_lines(["x"]))
    lock = tmp_path / "o.lock"
    holder = "import fcntl, sys, time; f = open(sys.argv[1], 'a+'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); "
    with subprocess.Popen(
        [sys.executable, "-c", holder + "time.sleep(60)", str(lock)], stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        try:
            with pytest.raises(ValueError, match=r"is writing .*give another --output-prefix"):
                preprocess([tmp_path / "a.jsonl"], output_prefix=tmp_path / "o", tokenizer_model=byte_level_folder)
        finally:
            other.kill()
    preprocess([tmp_path / "a.jsonl"], output_prefix=tmp_path / "o", tokenizer_model=byte_level_folder)
    assert not lock.exists()


@pytest.mark.parametrize("ending", ["_text_document.bin", "_text_tokens.bin"])
def test_a_full_disk_leaves_no_file_that_looks_complete(
    tmp_path: Path, byte_level_folder: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    (tmp_path / "a.jsonl").write_bytes(_lines(["some text"] * 100))
    real = os.fsync

    def full(descriptor: int) -> None:
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(ending + ".partial"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        preprocess([tmp_path / "a.jsonl"], output_prefix=tmp_path / "o", tokenizer_model=byte_level_folder)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]
