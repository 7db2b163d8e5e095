"""The list of a checkpoint's files with size and hash: written last, compared before anything is loaded."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch.distributed as dist

Key = TypeVar("Key")
MANIFEST_FILE = "manifest.json"
_ALGORITHM = "sha256"
_READ_BYTES = 8 << 20
_THREADS = 4
"""Files hashed at once by a rank: hashing and reading both let go of the interpreter."""


class ManifestError(ValueError):
    """A file is missing or is not what was written; the message names every such file and what is wrong with it."""


class FileRecord(NamedTuple):
    """What a file was when it was written."""

    size: int
    """Bytes."""
    digest: str
    """SHA-256, hexadecimal."""


def record_of(path: Path) -> FileRecord:
    """Size and hash of a file; OSError where it cannot be read."""
    digest = hashlib.new(_ALGORITHM)
    size = 0
    with open(path, "rb", buffering=0) as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
            size += len(block)
    return FileRecord(size, digest.hexdigest())


def records_of(paths: Iterable[Path]) -> dict[str, FileRecord]:
    """File name → size and hash, several files at a time."""
    listed = list(paths)
    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip((path.name for path in listed), pool.map(record_of, listed), strict=True))


def manifest_text(records: Mapping[str, FileRecord]) -> str:
    """What manifest.json holds."""
    files = {name: {"size": records[name].size, _ALGORITHM: records[name].digest} for name in sorted(records)}
    return json.dumps({"algorithm": _ALGORITHM, "files": files}, indent=1) + "\n"


def read_manifest(folder: Path) -> dict[str, FileRecord] | None:
    """File name → record; None where the folder has no manifest. ManifestError where it cannot be read."""
    path = folder / MANIFEST_FILE
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
        return {name: FileRecord(int(of["size"]), str(of[_ALGORITHM])) for name, of in content["files"].items()}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ManifestError(f"{MANIFEST_FILE} cannot be read ({type(error).__name__}: {error})") from error


def check_files(folder: Path, records: Mapping[str, FileRecord], *, hashes: bool = True) -> None:
    """ManifestError on every rank that names each file that is missing, of another size or of another content.

    Collective. Sizes are compared by every rank; the files are hashed once, spread over the ranks by size.
    """
    problems = _wrong_sizes(folder, records)
    if hashes and not problems:
        rank, ranks = dist.get_rank(), dist.get_world_size()
        mine = balanced({name: record.size for name, record in records.items()}, ranks)[rank]
        problems = _wrong_hashes(folder, {name: records[name] for name in mine})
    gathered: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, problems)
    found = list(dict.fromkeys(problem for of_rank in gathered for problem in of_rank))
    if found:
        more = f"; and {len(found) - 8} more" if len(found) > 8 else ""
        raise ManifestError("; ".join(found[:8]) + more)


def balanced(sizes: Mapping[Key, int], parts: int) -> list[list[Key]]:
    """Keys in ``parts`` lists of about equal sums, the largest first to whichever has the least. Deterministic."""
    shares: list[list[Key]] = [[] for _ in range(parts)]
    loads = [0] * parts
    for key in sorted(sizes, key=lambda key: -sizes[key]):
        least = loads.index(min(loads))
        shares[least].append(key)
        loads[least] += sizes[key]
    return shares


def _wrong_sizes(folder: Path, records: Mapping[str, FileRecord]) -> list[str]:
    problems = []
    for name, record in records.items():
        try:
            size = os.stat(folder / name).st_size
        except OSError as error:
            problems.append(f"{name} is missing" if isinstance(error, FileNotFoundError) else f"{name}: {error}")
            continue
        if size != record.size:
            problems.append(f"{name} has {size:,} bytes instead of {record.size:,}")
    return problems


def _wrong_hashes(folder: Path, records: Mapping[str, FileRecord]) -> list[str]:
    def problem(name: str) -> str | None:
        try:
            found = record_of(folder / name)
        except OSError as error:
            return f"{name}: {error}"
        return None if found == records[name] else f"the content of {name} has changed since it was written"

    with ThreadPoolExecutor(_THREADS) as pool:
        return [text for text in pool.map(problem, records) if text is not None]
