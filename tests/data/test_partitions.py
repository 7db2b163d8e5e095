"""Partitions, resumed and merged, are the single run byte for byte."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megabyte_distill.data.dataset_writer import DatasetWriter
from megabyte_distill.data.inputs import find_inputs
from megabyte_distill.data.manifest import Manifest, StoredPaths
from megabyte_distill.data.merge import merge_partitions
from megabyte_distill.data.partitions import assign
from megabyte_distill.data.records import OnInvalid
from megabyte_distill.data.verify import verify_dataset
from tests.data.preprocessing import preprocess
from tests.data.test_inputs import json_lines

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
KEYS = ("text", "id_text")


@pytest.fixture
def shards(tmp_path: Path, texts: list[str]) -> list[Path]:
    """Seven files of very different sizes, one of them empty, with a record that cannot be read in two of them."""
    folder = tmp_path / "shards"
    folder.mkdir()
    sizes = (1, 40, 0, 7, 90, 3, 12)
    for index, size in enumerate(sizes):
        content = json_lines(texts[:size]).replace(b'"id": 1', b'"id_text": "b"')
        broken = {1: b"{\n", 3: b'{"text": 1, "id_text": "b"}\n', 5: b"{\n"}.get(index, b"")
        (folder / f"{index}.jsonl").write_bytes(content + broken)
    return sorted(folder.iterdir())


@pytest.fixture
def arguments(byte_level_folder: Path) -> dict[str, object]:
    return {"tokenizer_model": byte_level_folder, "json_keys": KEYS, "on_invalid": OnInvalid.SKIP, "append_eod": True}


def files_under(prefix: Path) -> dict[str, bytes]:
    """Name behind the prefix → content."""
    return {
        path.name.removeprefix(prefix.name): path.read_bytes()
        for path in sorted(prefix.parent.glob(prefix.name + "*"))
        if path.is_file()
    }


@pytest.mark.parametrize("partitions", [1, 2, 5, 7])
def test_any_number_of_partitions_gives_the_same_bytes(
    tmp_path: Path, shards: list[Path], arguments: dict[str, object], partitions: int
) -> None:
    single, parts = tmp_path / "single", tmp_path / "parts"
    preprocess(shards, output_prefix=single, **arguments)
    preprocess(shards, output_prefix=parts, partitions=partitions, **arguments)
    assert files_under(parts) == files_under(single)
    assert verify_dataset(f"{parts}_text_document").skipped == {"invalid JSON": 2, "not a text": 1}


def test_partitions_of_several_machines_are_merged(
    tmp_path: Path, shards: list[Path], arguments: dict[str, object]
) -> None:
    single, parts = tmp_path / "single", tmp_path / "parts"
    preprocess(shards, output_prefix=single, **arguments)
    for index in (2, 0):
        preprocess(shards, output_prefix=parts, partitions=3, partition_index=index, **arguments)
    with pytest.raises(ValueError, match=r"1 of 3 partitions are missing \(1\)"):
        merge_partitions(parts, KEYS)
    preprocess(shards, output_prefix=parts, partitions=3, partition_index=1, **arguments)
    merge_partitions(parts, KEYS, keep=True)
    merged = {name: content for name, content in files_under(parts).items() if ".part-" not in name}
    assert merged == files_under(single) and len(files_under(parts)) == 4 * len(merged)
    before = Path(f"{parts}_text_document.bin").stat().st_mtime_ns
    for path in tmp_path.glob("parts_id_text*"):  # as a merge that was killed between two keys leaves it
        path.unlink()
    merge_partitions(parts, KEYS, keep=True)
    assert Path(f"{parts}_text_document.bin").stat().st_mtime_ns == before
    merge_partitions(parts, KEYS, overwrite=True)
    assert files_under(parts) == files_under(single)


def test_partitions_with_other_settings_are_not_merged(
    tmp_path: Path, shards: list[Path], arguments: dict[str, object]
) -> None:
    preprocess(shards, output_prefix=tmp_path / "o", partitions=2, partition_index=0, **arguments)
    other = {**arguments, "append_eod": False}
    preprocess(shards, output_prefix=tmp_path / "o", partitions=2, partition_index=1, **other)
    before = files_under(tmp_path / "o")
    with pytest.raises(
        ValueError, match=r"00001-of-00002_text_document.json: made with other settings or .*\(append_eod"
    ):
        merge_partitions(tmp_path / "o", KEYS)
    assert files_under(tmp_path / "o") == before


def test_partitions_cut_from_different_files_are_not_merged(
    tmp_path: Path, shards: list[Path], arguments: dict[str, object]
) -> None:
    folder = shards[0].parent
    preprocess([folder], output_prefix=tmp_path / "o", partitions=2, partition_index=0, **arguments)
    (folder / "00.jsonl").write_bytes(json_lines(["new"]).replace(b'"id": 1', b'"id_text": "b"'))
    preprocess([folder], output_prefix=tmp_path / "o", partitions=2, partition_index=1, **arguments)
    with pytest.raises(ValueError, match=r"cut from other files \(corpus"):
        merge_partitions(tmp_path / "o", KEYS)
    assert not list(tmp_path.glob("o_*"))


def test_another_data_set_in_the_place_of_the_merge_is_refused(
    tmp_path: Path, shards: list[Path], arguments: dict[str, object]
) -> None:
    preprocess(shards[:2], output_prefix=tmp_path / "o", **arguments)
    for index in range(2):
        preprocess(shards, output_prefix=tmp_path / "o", partitions=2, partition_index=index, **arguments)
    with pytest.raises(ValueError, match="is another data set; pass --overwrite"):
        merge_partitions(tmp_path / "o", KEYS)


def test_a_partition_of_another_run_does_not_stand_in_the_way(
    tmp_path: Path, shards: list[Path], arguments: dict[str, object]
) -> None:
    preprocess(shards, output_prefix=tmp_path / "o", partitions=2, partition_index=1, **arguments)
    preprocess(shards, output_prefix=tmp_path / "o", partitions=3, **arguments)
    assert verify_dataset(str(tmp_path / "o_text_document")).documents == 152 + 1


def test_a_damaged_partition_is_not_merged(tmp_path: Path, shards: list[Path], arguments: dict[str, object]) -> None:
    for index in range(2):
        preprocess(shards, output_prefix=tmp_path / "o", partitions=2, partition_index=index, **arguments)
    damaged = next(tmp_path.glob("o.part-00001*text_tokens.bin"))
    damaged.write_bytes(damaged.read_bytes()[:-2])
    with pytest.raises(ValueError, match=r"text_tokens\.bin: .*truncated or damaged"):
        merge_partitions(tmp_path / "o", KEYS)
    assert not list(tmp_path.glob("o_*"))


def test_resume_leaves_finished_partitions_and_refuses_others(
    tmp_path: Path, shards: list[Path], arguments: dict[str, object]
) -> None:
    lines: list[str] = []
    prefix = tmp_path / "o"
    preprocess(shards, output_prefix=prefix, partitions=3, partition_index=1, **arguments)
    first = next(tmp_path.glob("o.part-00001*text_document.bin"))
    before = first.stat().st_mtime_ns
    with pytest.raises(ValueError, match="pass --resume to go on"):
        preprocess(shards, output_prefix=prefix, partitions=3, partition_index=1, **arguments)
    preprocess(
        shards, output_prefix=prefix, partitions=3, partition_index=1, resume=True, report=lines.append, **arguments
    )
    assert first.stat().st_mtime_ns == before and "finished before" in lines[-1]
    with pytest.raises(ValueError, match="from other inputs, settings or library versions"):
        other = {**arguments, "on_invalid": OnInvalid.REPLACE}
        preprocess(shards, output_prefix=prefix, partitions=3, resume=True, **other)
    preprocess(shards, output_prefix=prefix, partitions=3, resume=True, **arguments)
    preprocess(shards, output_prefix=prefix, partitions=3, resume=True, report=lines.append, **arguments)
    assert lines[-1] == f"{prefix}: finished before, left as it is" and len(
        list(tmp_path.glob("o*_document.idx"))
    ) == len(KEYS)
    preprocess(shards, output_prefix=tmp_path / "single", **arguments)
    assert files_under(prefix) == files_under(tmp_path / "single")


def test_resume_refuses_inputs_that_were_changed_since(
    tmp_path: Path, shards: list[Path], arguments: dict[str, object]
) -> None:
    preprocess(shards, output_prefix=tmp_path / "o", partitions=2, partition_index=0, **arguments)
    content = shards[0].read_bytes()
    shards[0].write_bytes(content.replace(b"b", b"c"))
    manifest = next(tmp_path.glob("o.part-00000*text_document.json"))
    os.utime(shards[0], ns=(0, manifest.stat().st_mtime_ns + 1))
    with pytest.raises(ValueError, match=r"finished, but .*0\.jsonl was changed since"):
        preprocess(shards, output_prefix=tmp_path / "o", partitions=2, resume=True, **arguments)


def test_replacing_a_data_set_leaves_nothing_old_for_a_resume(
    tmp_path: Path, shards: list[Path], arguments: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    preprocess(shards, output_prefix=tmp_path / "o", partitions=2, **arguments)
    real, calls = DatasetWriter.publish, []

    def stop_at_the_second_partition(writer: DatasetWriter) -> None:
        calls.append(writer)
        if len(calls) > len(KEYS):
            raise KeyboardInterrupt
        real(writer)

    with monkeypatch.context() as patch:
        patch.setattr(DatasetWriter, "publish", stop_at_the_second_partition)
        with pytest.raises(KeyboardInterrupt):
            preprocess(shards, output_prefix=tmp_path / "o", partitions=2, overwrite=True, **arguments)
    assert not list(tmp_path.glob("o_*")) and len(list(tmp_path.glob("o.part-*.idx"))) == 2 * len(KEYS)
    preprocess(shards, output_prefix=tmp_path / "o", partitions=2, resume=True, **arguments)
    preprocess(shards, output_prefix=tmp_path / "single", **arguments)
    assert files_under(tmp_path / "o") == files_under(tmp_path / "single")


def test_replacing_one_key_leaves_the_partitions_of_another_whose_name_ends_alike(
    tmp_path: Path, shards: list[Path], arguments: dict[str, object]
) -> None:
    other = {**arguments, "json_keys": ("id_text",)}
    preprocess(shards, output_prefix=tmp_path / "o", partitions=2, partition_index=0, **other)
    before = files_under(tmp_path / "o")
    preprocess(
        shards, output_prefix=tmp_path / "o", partitions=2, overwrite=True, **{**arguments, "json_keys": ("text",)}
    )
    assert before.items() <= files_under(tmp_path / "o").items()


def test_shares_are_contiguous_complete_and_balanced(tmp_path: Path) -> None:
    sizes = [5, 1, 1, 1, 90, 1, 1, 60, 3, 3]
    for index, size in enumerate(sizes):
        (tmp_path / f"{index}.txt").write_bytes(b"x" * size)
    files = find_inputs([tmp_path])
    for partitions in range(1, len(files) + 1):
        shares = assign(files, partitions)
        assert len(shares) == partitions and all(shares)
        assert [file for share in shares for file in share] == files
    assert [len(share) for share in assign(files, 2)] == [5, 5]
    with pytest.raises(ValueError, match="--partitions 11 of 10 input files"):
        assign(files, 11)


def test_a_killed_run_goes_on_and_ends_like_one_that_was_not(
    tmp_path: Path, byte_level_folder: Path, texts: list[str]
) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    for index in range(4):
        (folder / f"{index}.jsonl").write_bytes(json_lines(texts * 60))
    command = [
        *(sys.executable, str(ROOT / "tools" / "preprocess_bytes.py"), "--input", str(folder), "--partitions", "4"),
        *("--tokenizer-model", str(byte_level_folder), "--workers", "2", "--resume", "--output-prefix"),
    ]
    prefix, kills = tmp_path / "o", 0
    for kill_after in (1, 3, None):  # partitions that are complete when the kill comes
        process = subprocess.Popen([*command, str(prefix)], cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while kill_after is not None and process.poll() is None and time.monotonic() < deadline:
            if len(list(tmp_path.glob("o.part-*_text_document.idx"))) >= kill_after:
                os.kill(process.pid, signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.002)
        process.wait(timeout=120)
        for idx in tmp_path.glob("o*_text_document.idx"):
            verify_dataset(str(idx.with_suffix("")))
    assert process.returncode == 0 and kills == 2
    preprocess([folder], output_prefix=tmp_path / "single", tokenizer_model=byte_level_folder)
    assert files_under(prefix) == files_under(tmp_path / "single")


def test_the_slurm_example_makes_the_same_data_set(tmp_path: Path, byte_level_folder: Path, shards: list[Path]) -> None:
    script = ROOT / "examples" / "slurm" / "preprocess_array.sh"
    environment = {
        **ENVIRONMENT,
        "INPUT": str(shards[0].parent),
        "TOKENIZER": str(byte_level_folder),
        "OUTPUT_PREFIX": str(tmp_path / "o"),
        "MORE": "--on-invalid skip",
        "PYTHON": sys.executable,
        "SLURM_ARRAY_TASK_COUNT": "3",
    }
    for task in ("1", "0", "2"):
        subprocess.run(
            ["bash", script], env={**environment, "SLURM_ARRAY_TASK_ID": task}, check=True, cwd=ROOT, timeout=120
        )
    merge: Callable[..., object] = subprocess.run
    merge(["bash", script, "merge"], env=environment, check=True, cwd=ROOT, timeout=120)
    preprocess(shards, output_prefix=tmp_path / "single", tokenizer_model=byte_level_folder, on_invalid=OnInvalid.SKIP)
    ours, single = (Manifest.load(StoredPaths.of(tmp_path / name, "text").manifest) for name in ("o", "single"))
    assert (ours.documents, ours.bytes, ours.digest) == (single.documents, single.bytes, single.digest)
