"""A corpus cut into partitions of whole files, each a data set of its own until they are merged."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from megabyte_distill.data.inputs import InputFile
from megabyte_distill.data.manifest import StoredPaths

_PART = ".part-{index:05d}-of-{count:05d}"


def assign(files: Sequence[InputFile], partitions: int) -> list[list[InputFile]]:
    """Contiguous runs of files, at least one each, of about equal bytes; the same on every machine.

    ValueError for more partitions than files: a file is not cut.
    """
    if not 1 <= partitions <= len(files):
        raise ValueError(
            f"--partitions {partitions} of {len(files)} input files: a partition is made of whole files; give "
            f"1 … {len(files)}, or cut the input into more files"
        )
    sizes = [file.size() or 0 for file in files]
    total, place, taken = sum(sizes), 0, 0
    result: list[list[InputFile]] = []
    for index in range(partitions):
        left_for_others = partitions - index - 1
        first = place
        goal = total * (index + 1) / partitions
        # a file belongs to the partition in which the greater part of it lies
        while place < len(files) - left_for_others and (place == first or taken + sizes[place] / 2 <= goal):
            taken += sizes[place]
            place += 1
        result.append(list(files[first:place]))
    result[-1].extend(files[place:])
    return result


def part_prefix(prefix: str | Path, index: int, count: int) -> str:
    """The output prefix of one partition."""
    return str(prefix) + _PART.format(index=index, count=count)


def find_parts(prefix: str | Path, key: str, count: int | None = None) -> list[StoredPaths]:
    """The partitions that lie under a prefix, in order, of a run of ``count`` where that is known.

    ValueError where some are missing, or where they are of several runs and ``count`` is not given.
    """
    found = _parts_with(prefix, key, ".idx")
    counts = sorted({of for _, of in found if count in (None, of)})
    if len(counts) != 1:
        seen = f"partitions of {', '.join(map(str, counts))}" if counts else "none"
        raise ValueError(f"{prefix}: expected the partitions of one run for the key {key!r}, found {seen}")
    [count] = counts
    there = {index for index, of in found if of == count}
    missing = [index for index in range(count) if index not in there]
    if missing:
        shown = ", ".join(map(str, missing[:10])) + (", …" if len(missing) > 10 else "")
        raise ValueError(
            f"{prefix}: {len(missing)} of {count} partitions are missing ({shown}); preprocess them with "
            "--partition-index"
        )
    return [StoredPaths.of(part_prefix(prefix, index, count), key) for index in range(count)]


def all_parts(prefix: str | Path, key: str) -> list[StoredPaths]:
    """Whatever partitions of whatever run lie under a prefix."""
    return [StoredPaths.of(part_prefix(prefix, *part), key) for part in _parts_with(prefix, key, ".json")]


def _parts_with(prefix: str | Path, key: str, ending: str) -> list[tuple[int, int]]:
    """(index, number of partitions) of those whose file with this ending lies under a prefix, sorted."""
    name = re.escape(Path(prefix).name) + r"\.part-(\d{5})-of-(\d{5})"
    pattern = re.compile(name + re.escape(StoredPaths.of("", key).stem + ending))
    matches = map(pattern.fullmatch, (path.name for path in Path(prefix).parent.glob("*" + ending)))
    return sorted((int(match[1]), int(match[2])) for match in matches if match)
