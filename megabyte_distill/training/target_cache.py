"""A folder of the teacher's exact byte targets, by document and byte: written once, read instead of the teacher.

    DIR/cache.json           what they were made from: :class:`CacheIdentity`
    DIR/shard_000000.bin     targets of consecutive documents; its sections: see ``_sections``
    DIR/shard_000000.json    what is in it, written behind it: a shard without this file is made again
    DIR/manifest.json        size and hash of every file, written last: a cache without it is not complete

A document of L bytes has L + 1 targets: before each byte, and at its end.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megabyte_distill.data.dataset import DocumentSource
from megabyte_distill.data.sampler import RowPlan
from megabyte_distill.data.stored_targets import StoredTargets
from megabyte_distill.files import write_whole
from megabyte_distill.training.manifest import (
    MANIFEST_FILE,
    FileRecord,
    ManifestError,
    manifest_text,
    read_manifest,
    record_of,
)

IDENTITY_FILE = "cache.json"
_SCHEMA = 1
_STRIDE = 1024
"""Targets between two of which the index says where their entries begin."""
_OPEN_SHARDS = 64
"""Shards mapped at once: the kernel limits how many maps a process has."""
_AGAIN = "make the cache again with tools/cache_teacher.py"


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheIdentity:
    """What decides every number of a cache."""

    tokenizer_hash: str
    teacher_hash: str
    """:func:`teacher_hash` of the checkpoint."""
    dtype: str
    """In which the teacher ran."""
    top_k: int
    context_tokens: int
    """The teacher reads a document in windows of at most so many tokens behind its start id."""
    overlap_tokens: int
    """So many of a window's first tokens are the last ones of the window before, for context alone."""
    shard_bytes: int
    datasets: tuple[tuple[str, int, int], ...]
    """(digest, first document, document behind the last) of each data set."""
    schema: int = _SCHEMA

    def differences(self, other: CacheIdentity) -> list[str]:
        """What differs, for an error message."""
        mine, theirs = asdict(self), asdict(other)
        return [f"{name}: {mine[name]} there, {theirs[name]} now" for name in mine if mine[name] != theirs[name]]

    def save(self, folder: Path) -> None:
        """Writes DIR/cache.json; complete or absent."""
        _write_json(folder / IDENTITY_FILE, asdict(self))

    @classmethod
    def load(cls, folder: Path) -> CacheIdentity | None:
        """None where there is none yet; ValueError where it cannot be read or is of another version."""
        path = folder / IDENTITY_FILE
        if not path.exists():
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            content["datasets"] = tuple((str(d), int(first), int(stop)) for d, first, stop in content["datasets"])
            found = cls(**content)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: not a readable target cache ({error}); {_AGAIN}") from error
        if found.schema != _SCHEMA:
            raise ValueError(f"{path}: version {found.schema}, expected {_SCHEMA}; {_AGAIN}")
        return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """What a shard holds: documents ``first`` … ``stop`` − 1 of a data set."""

    number: int
    dataset: int
    """Position among ``CacheIdentity.datasets``."""
    first: int
    stop: int
    targets: int = 0
    entries: int = 0
    replaced: int = 0
    """Targets that are the text's own byte and bit, the teacher having no opinion."""
    excluded: float = 0.0
    """Sum over tokens of the teacher's mass on ids that cannot be text."""
    tokens: int = 0
    """Over how many that is."""

    @property
    def name(self) -> str:
        """Of its files, without the ending."""
        return f"shard_{self.number:06d}"

    def load(self, folder: Path) -> Shard | None:
        """The shard as it was written, None where it was not. ValueError where the file there is of another plan."""
        path = folder / f"{self.name}.json"
        if not path.exists():
            return None
        try:
            found = Shard(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(f"{path}: not a readable shard of a target cache ({error}); {_AGAIN}") from error
        if (found.number, found.dataset, found.first, found.stop) != (self.number, self.dataset, self.first, self.stop):
            raise ValueError(f"{path} is of other documents than expected; {_AGAIN}")
        return found


def teacher_hash(checkpoint: Path) -> str:
    """Says which weights an iter_* folder holds: SHA-256 of its files' sizes and hashes.

    ValueError where the folder does not list them.
    """
    records = read_manifest(checkpoint)
    if records is None:
        raise ValueError(f"{checkpoint} has no {MANIFEST_FILE}, by which a teacher is known; convert the teacher again")
    return hashlib.sha256(manifest_text(records).encode()).hexdigest()


def plan_shards(sizes: Sequence[NDArray[np.int64]], firsts: Sequence[int], shard_bytes: int) -> list[Shard]:
    """Consecutive documents of about ``shard_bytes`` bytes each, at least one, whatever makes them.

    ``sizes``: bytes of each data set's documents, the first of which has the number in ``firsts``.
    """
    shards: list[Shard] = []
    for dataset, (lengths, offset) in enumerate(zip(sizes, firsts, strict=True)):
        ends = np.cumsum(lengths + 1)
        first = 0
        while first < lengths.size:
            before = int(ends[first - 1]) if first else 0
            stop = max(first + 1, int(np.searchsorted(ends, before + shard_bytes, side="right")))
            shards.append(Shard(number=len(shards), dataset=dataset, first=offset + first, stop=offset + stop))
            first = stop
    return shards


def _sections(shard: Shard) -> list[tuple[str, str, int]]:
    """(name, dtype, length) of what lies one after the other in the .bin file."""
    return [
        ("document_first", "<i8", shard.stop - shard.first + 1),
        ("entry_first", "<i8", -(-shard.targets // _STRIDE) + 1),
        ("counts", "<u2", shard.targets),
        ("tail", "<f2", shard.targets),
        ("classes", "<i2", shard.entries),
        ("probabilities", "<f2", shard.entries),
    ]


def write_shard(folder: Path, shard: Shard, document_sizes: Sequence[int], targets: StoredTargets) -> None:
    """Writes both files, the .json last; complete or absent.

    ``document_sizes``: number of targets of each document; ``targets``: of all of them, on the CPU.
    """
    counts = targets.counts.numpy().astype("<u2")
    ends = np.concatenate((np.zeros(1, dtype="<i8"), np.cumsum(counts, dtype="<i8")))
    at = np.minimum(np.arange(-(-shard.targets // _STRIDE) + 1) * _STRIDE, shard.targets)
    arrays = {
        "document_first": np.concatenate(([0], np.cumsum(document_sizes))).astype("<i8"),
        "entry_first": ends[at],
        "counts": counts,
        "tail": targets.tail.numpy().astype("<f2"),
        "classes": targets.classes.numpy().astype("<i2"),
        "probabilities": targets.probabilities.numpy().astype("<f2"),
    }
    content = b"".join(arrays[name].tobytes() for name, _, _ in _sections(shard))
    write_whole(folder / f"{shard.name}.bin", content)
    _write_json(folder / f"{shard.name}.json", asdict(shard))


def finish(folder: Path, shards: Iterable[Shard]) -> None:
    """Writes DIR/manifest.json: from now on the cache is complete."""
    paths = [folder / f"{shard.name}{ending}" for shard in shards for ending in (".bin", ".json")]
    records = {path.name: record_of(path) for path in [folder / IDENTITY_FILE, *paths]}
    write_whole(folder / MANIFEST_FILE, manifest_text(records).encode())


class TargetCache:
    """A complete cache. Sizes are compared when it is opened, a shard's content when it is first read."""

    def __init__(self, folder: Path, *, verify: bool = True) -> None:
        """``verify``: compare hashes as well. ValueError where the folder is no complete cache or is damaged."""
        self.folder, self._verify = folder, verify
        identity = CacheIdentity.load(folder)
        if identity is None:
            raise ValueError(f"{folder} is no target cache: there is no {IDENTITY_FILE}; {_AGAIN}")
        self.identity = identity
        try:
            records = read_manifest(folder)
        except ManifestError as error:
            raise ValueError(f"{folder}: {error}; {_AGAIN}") from error
        if records is None:
            raise ValueError(f"{folder} is not complete: start tools/cache_teacher.py again, it goes on where it ended")
        self._records = records
        self._check_sizes(records)
        names = sorted(name.removesuffix(".bin") for name in records if name.endswith(".bin"))
        self._check(IDENTITY_FILE, *(f"{name}.json" for name in names))
        self.shards = [Shard(**json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))) for name in names]
        self._verified: set[int] = set()
        self._open = lru_cache(_OPEN_SHARDS)(self._mapped)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(record.size for record in self._records.values())

    def _check_sizes(self, records: Mapping[str, FileRecord]) -> None:
        for name, record in records.items():
            path = self.folder / name
            if not path.is_file():
                raise ValueError(f"{path} is missing; {_AGAIN}")
            if path.stat().st_size != record.size:
                raise ValueError(f"{path} has {path.stat().st_size:,} bytes instead of {record.size:,}; {_AGAIN}")

    def _check(self, *names: str) -> None:
        for name in names if self._verify else ():
            if record_of(self.folder / name) != self._records[name]:
                raise ValueError(f"the content of {self.folder / name} has changed since it was written; {_AGAIN}")

    def verify_all(self) -> None:
        """Compare the hash of every file; ValueError for the first one that has changed."""
        self._check(*self._records)

    def require(self, *, tokenizer_hash: str, teacher: str, datasets: Sequence[DocumentSource]) -> None:
        """ValueError where the cache is of another tokenizer, teacher or text; names all that does not fit."""
        wrong = []
        if self.identity.tokenizer_hash != tokenizer_hash:
            wrong.append(f"its tokenizer is {self.identity.tokenizer_hash[:16]}…, the teacher's {tokenizer_hash[:16]}…")
        if self.identity.teacher_hash != teacher:
            wrong.append(
                f"its teacher is {self.identity.teacher_hash[:16]}…, the run's {teacher[:16]}… (another conversion of "
                "the same weights counts as another)"
            )
        for source in datasets:
            covered = [(first, stop) for digest, first, stop in self.identity.datasets if digest == source.digest]
            documents = source.documents
            if not covered:
                wrong.append(f"it knows nothing of {source.name}")
            elif not any(first <= documents.start and documents.stop <= stop for first, stop in covered):
                wrong.append(f"it covers documents {covered} of {source.name}, of which {documents} are needed")
        if wrong:
            raise ValueError(f"the target cache {self.folder} does not fit: {'; '.join(wrong)}; {_AGAIN}")

    @cached_property
    def _starts(self) -> dict[str, tuple[list[int], list[Shard]]]:
        """By digest: where shards begin, ascending, and the shards."""
        found: dict[str, tuple[list[int], list[Shard]]] = {}
        for shard in sorted(self.shards, key=lambda shard: shard.first):
            starts, shards = found.setdefault(self.identity.datasets[shard.dataset][0], ([], []))
            starts.append(shard.first)
            shards.append(shard)
        return found

    def of_bytes(self, digest: str, document: int, first: int, last: int) -> StoredTargets:
        """Targets ``first`` … ``last``, that is before those bytes of a document (before its end, for its length).

        ValueError where the cache has none.
        """
        starts, shards = self._starts[digest]
        place = bisect_right(starts, document) - 1
        if place < 0 or document >= shards[place].stop:
            raise ValueError(f"{self.folder} has no targets of document {document}; {_AGAIN}")
        shard = shards[place]
        content = self._open(shard)
        begin, end = (int(content["document_first"][document - shard.first + i]) for i in (0, 1))
        if begin + last >= end:
            raise ValueError(
                f"{self.folder} has {end - begin} targets of document {document}, the text needs {last + 1}; {_AGAIN}"
            )
        low, high = begin + first, begin + last + 1
        counts = content["counts"]
        block = low // _STRIDE
        entry = int(content["entry_first"][block]) + int(counts[block * _STRIDE : low].sum(dtype=np.int64))
        own = counts[low:high].astype(np.int32)
        entries = slice(entry, entry + int(own.sum(dtype=np.int64)))
        return StoredTargets(
            counts=torch.from_numpy(own),
            tail=torch.from_numpy(np.array(content["tail"][low:high])),
            classes=torch.from_numpy(np.array(content["classes"][entries])),
            probabilities=torch.from_numpy(np.array(content["probabilities"][entries])),
        )

    def of_row(self, plan: RowPlan, datasets: Sequence[DocumentSource], row_bytes: int) -> StoredTargets:
        """Targets of a planned row, BOS standing before a segment's first byte, and none on its unused end."""
        digest = datasets[plan.dataset].digest
        parts = [self.of_bytes(digest, part.document, part.byte_start, part.byte_end) for part in plan.segments]
        used = sum(part.counts.shape[0] for part in parts)
        return StoredTargets.joined([*parts, StoredTargets.nothing(row_bytes - used)])

    def _mapped(self, shard: Shard) -> Mapping[str, NDArray[Any]]:
        if shard.number not in self._verified:
            self._check(f"{shard.name}.bin")
            self._verified.add(shard.number)
        raw = np.memmap(self.folder / f"{shard.name}.bin", dtype=np.uint8, mode="r")
        sections = _sections(shard)
        edges = np.cumsum([0, *(np.dtype(dtype).itemsize * length for _, dtype, length in sections)]).tolist()
        return {
            name: raw[low:high].view(dtype)
            for (name, dtype, _), (low, high) in zip(sections, pairwise(edges), strict=True)
        }


def _write_json(path: Path, content: Any) -> None:
    write_whole(path, (json.dumps(content, indent=1) + "\n").encode())
