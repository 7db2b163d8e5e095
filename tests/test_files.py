"""A file is complete or what it was before, whatever goes wrong on the way."""

from __future__ import annotations

from pathlib import Path

import pytest

from megabyte_distill import files


@pytest.mark.parametrize("place", ["write_and_sync", "publish"])
def test_what_was_there_stays_until_the_new_content_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    final = tmp_path / "a.json"
    files.write_whole(final, b"before")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(files, place, full)
        with pytest.raises(OSError, match="No space"):
            files.write_whole(final, b"after")
    assert final.read_bytes() == b"before"
    files.write_whole(final, b"after")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"] and final.read_bytes() == b"after"


def test_a_renamed_file_and_its_folder_are_on_the_disk_in_that_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    real_sync, real_replace = files.os.fsync, files.os.replace

    def sync(descriptor: int) -> None:
        done.append(f"sync {Path(f'/proc/self/fd/{descriptor}').resolve().name}")
        real_sync(descriptor)

    def replace(source: Path, target: Path) -> None:
        done.append(f"rename to {target.name}")
        real_replace(source, target)

    monkeypatch.setattr(files.os, "fsync", sync)
    monkeypatch.setattr(files.os, "replace", replace)
    files.write_whole(tmp_path / "a", b"content")
    assert done == ["sync a.partial", "rename to a", f"sync {tmp_path.name}"]
