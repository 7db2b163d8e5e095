"""Files are shared out among ranks, each read once, and what one rank finds all of them say."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from unittest import mock

import pytest
import torch.distributed as dist

from megabyte_distill.parallel.process_groups import World
from megabyte_distill.training import manifest
from megabyte_distill.training.manifest import ManifestError, balanced, check_files, records_of
from tests.distributed.ranks import run_ranks


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_shares_are_whole_and_even(parts: int) -> None:
    sizes = {f"file {n}": (n * n * 37) % 101 for n in range(40)}
    shares = balanced(sizes, parts)
    assert sorted(name for share in shares for name in share) == sorted(sizes)
    loads = [sum(sizes[name] for name in share) for share in shares]
    assert max(loads) - min(loads) <= max(sizes.values())
    assert balanced(sizes, parts) == shares


def test_fewer_files_than_parts_leave_empty_shares() -> None:
    assert balanced({"a": 1}, 3) == [["a"], [], []]


def damaged_elsewhere(world: World) -> dict[str, object]:
    """Four files, of which each rank hashes two; each file damaged in turn."""
    folders = [tempfile.mkdtemp() if world.is_main else ""]
    dist.broadcast_object_list(folders, src=0)
    folder = Path(folders[0])
    names = ["a", "b", "c", "d"]
    if world.is_main:
        for name in names:
            (folder / name).write_bytes(os.urandom(1000))
    dist.barrier()
    records = records_of(folder / name for name in names)
    read: list[str] = []
    hashed = manifest.record_of

    def noted(path: Path) -> manifest.FileRecord:
        read.append(path.name)
        return hashed(path)

    said = []
    with mock.patch.object(manifest, "record_of", noted):
        check_files(folder, records)
        first = sorted(read)
        for name in names:
            if world.is_main:
                (folder / name).write_bytes(os.urandom(1000))
            dist.barrier()
            try:
                check_files(folder, records)
            except ManifestError as error:
                said.append(str(error))
            dist.barrier()
    return {"read": first, "said": said}


def test_each_rank_hashes_its_share_and_both_say_what_either_found(tmp_path: Path) -> None:
    one, other = run_ranks(tmp_path, "tests.training.test_manifest", "damaged_elsewhere")
    assert sorted(one["read"] + other["read"]) == ["a", "b", "c", "d"] and len(one["read"]) == 2
    assert one["said"] == other["said"]
    assert [text.count("has changed since it was written") for text in one["said"]] == [1, 2, 3, 4]
