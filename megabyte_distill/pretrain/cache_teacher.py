"""Makes a target cache: the teacher reads every document once, its exact byte targets are cut down and stored."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from megabyte_distill.alphabet import JOINT_CLASSES
from megabyte_distill.data.dataset import ByteTokenDataset
from megabyte_distill.data.file_lock import only_process
from megabyte_distill.data.packing import Segment, pack_row
from megabyte_distill.data.stored_targets import StoredTargets
from megabyte_distill.data.token_bytes import TokenBytes
from megabyte_distill.files import partial_path
from megabyte_distill.model.backbone import Backbone
from megabyte_distill.objectives.byte_tree import ByteTree
from megabyte_distill.objectives.exact_targets import exact_targets
from megabyte_distill.objectives.truncated_targets import truncated
from megabyte_distill.parallel.process_groups import World, on_main_rank
from megabyte_distill.training.logging import duration
from megabyte_distill.training.manifest import MANIFEST_FILE
from megabyte_distill.training.target_cache import (
    IDENTITY_FILE,
    CacheIdentity,
    Shard,
    TargetCache,
    finish,
    plan_shards,
    write_shard,
)

_CHUNK_BUCKET = 64
LOCK_FILE = ".lock"


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheSettings:
    """How a cache is made, apart from what it is made from."""

    top_k: int = 32
    context_tokens: int = 2048
    overlap_tokens: int = 512
    shard_bytes: int = 8 << 20
    batch_tokens: int = 8192

    def __post_init__(self) -> None:
        problems = []
        if not 1 <= self.top_k <= JOINT_CLASSES:
            problems.append(f"--logits-save-top-k {self.top_k}: expected 1 to {JOINT_CLASSES}")
        if self.context_tokens < 1 or not 0 <= self.overlap_tokens < self.context_tokens:
            problems.append(
                f"--context-tokens {self.context_tokens}, --overlap-tokens {self.overlap_tokens}: expected at least 1, "
                "and from 0 to less than that"
            )
        if self.shard_bytes < 1 or self.batch_tokens < 1:
            problems.append(
                f"--shard-bytes {self.shard_bytes}, --micro-batch-tokens {self.batch_tokens}: expected at least 1"
            )
        if problems:
            raise ValueError("; ".join(problems))


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens of a document that the teacher reads at once."""

    start: int
    stop: int
    new: int
    """The first token that no window before predicts; ``start`` in the first window."""


def windows_of(tokens: int, settings: CacheSettings) -> Iterator[Window]:
    """Over a document of so many tokens, at least one; every token and the document's end is predicted once."""
    start = new = 0
    while True:
        stop = min(tokens, start + settings.context_tokens)
        yield Window(start, stop, new)
        if stop == tokens:
            return
        start, new = stop - settings.overlap_tokens, stop


@dataclass(slots=True)
class _Batch:
    """Windows that go through the teacher side by side."""

    segments: list[Segment] = field(default_factory=list)
    skipped: list[int] = field(default_factory=list)
    """Targets at each segment's beginning that another window gives."""
    tokens: int = 0

    def add(
        self, document: int, tokens: NDArray[Any], lengths: NDArray[Any], text: NDArray[np.uint8], of: Window
    ) -> None:
        ends = np.concatenate((np.zeros(1, dtype=np.int64), np.cumsum(lengths, dtype=np.int64)))
        is_last = of.stop == tokens.size
        self.segments.append(
            Segment(
                document=document,
                byte_ids=text[ends[of.start] : ends[of.stop]],
                tokens=tokens[of.start : of.stop],
                token_lengths=lengths[of.start : of.stop],
                next_byte=None if is_last else int(text[ends[of.stop]]),
                next_token=None if is_last else int(tokens[of.stop]),
                next_token_length=None if is_last else int(lengths[of.stop]),
            )
        )
        # BOS stands for the boundary at the window's start, and the boundary at ``new`` is the window's before
        self.skipped.append(int(ends[of.new] - ends[of.start]) + 1 if of.new else 0)
        self.tokens += 1 + of.stop - of.start


@dataclass(slots=True)
class _ShardParts:
    """What the batches of a shard gave."""

    targets: list[StoredTargets] = field(default_factory=list)
    replaced: int = 0
    excluded: float = 0.0
    tokens: int = 0


class Maker:
    """A teacher that turns documents into stored targets."""

    def __init__(self, teacher: Backbone, table: TokenBytes, settings: CacheSettings) -> None:
        self._teacher, self._table, self._settings = teacher, table, settings
        self._tree = ByteTree.of(table).to(teacher.device)

    def shard(self, dataset: ByteTokenDataset, planned: Shard) -> tuple[Shard, list[int], StoredTargets]:
        """(the shard with its counts, targets of each document, all of them) of the planned documents."""
        parts, batch, sizes = _ShardParts(), _Batch(), []
        for number in range(planned.first, planned.stop):
            document = dataset[number]
            sizes.append(document.byte_ids.size + 1)
            lengths = self._table.lengths[document.tokens]
            for window in windows_of(document.tokens.size, self._settings):
                batch.add(number, document.tokens, lengths, document.byte_ids, window)
                if batch.tokens >= self._settings.batch_tokens:
                    self._run(batch, parts)
                    batch = _Batch()
        if batch.segments:
            self._run(batch, parts)
        targets = StoredTargets.joined(parts.targets)
        made = dataclasses.replace(
            planned,
            targets=targets.counts.shape[0],
            entries=targets.classes.shape[0],
            replaced=parts.replaced,
            excluded=parts.excluded,
            tokens=parts.tokens,
        )
        return made, sizes, targets

    @torch.no_grad()
    def _run(self, batch: _Batch, parts: _ShardParts) -> None:
        sizes = [1 + segment.byte_ids.size for segment in batch.segments]
        row = pack_row(
            batch.segments,
            row_bytes=sum(sizes),
            chunk_bucket=_CHUNK_BUCKET,
            start_id=self._table.start_id,
            end_of_text_id=self._table.end_of_text_id,
        )
        wanted = row.is_real.clone()
        first = 0
        for size, skipped in zip(sizes, batch.skipped, strict=True):
            wanted[first : first + skipped] = False
            first += size
        row = row.to(self._teacher.device)
        wanted = wanted.to(self._teacher.device)
        found = exact_targets(
            self._tree,
            self._teacher(self._teacher.embed(row.tokens), row.cu_chunks),
            head=self._teacher.own_logits,
            byte_ids=row.byte_ids,
            bits=row.bits,
            labels=row.labels,
            wanted=wanted,
        )
        parts.targets.append(truncated(found.distribution[wanted], self._settings.top_k).to("cpu"))
        parts.replaced += int(found.replaced)
        parts.excluded += float(found.excluded)
        parts.tokens += int(found.chunks)


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheReport:
    """What a complete cache is."""

    documents: int
    text_bytes: int
    cache_bytes: int
    shards: int
    shards_made: int
    """By all ranks of this run; the others were there."""
    entries_per_target: float
    replaced: float
    """Share of targets that are the text's own byte and bit."""
    excluded: float
    """Mean mass of the teacher on ids that cannot be text."""
    text_bytes_per_second: float
    """Of this run's ranks together, until the slowest one was ready."""

    @property
    def cache_bytes_per_text_byte(self) -> float:
        """Bytes on the disk for each byte of text."""
        return self.cache_bytes / max(1, self.text_bytes)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**dataclasses.asdict(self), "cache_bytes_per_text_byte": self.cache_bytes_per_text_byte}


def make_cache(
    folder: Path,
    teacher: Backbone,
    table: TokenBytes,
    datasets: Sequence[ByteTokenDataset],
    settings: CacheSettings,
    *,
    teacher_hash: str,
    world: World,
    say: Callable[[str], None],
) -> CacheReport:
    """Writes the cache of whole data sets into ``folder``, going on where an earlier run ended; verifies it at the end.

    Each rank makes every so-manieth shard. Sets without documents are left out, as in training. ValueError where none
    has any, the folder holds a cache of something else, or somebody else is writing it.
    """
    datasets = [dataset for dataset in datasets if len(dataset)]
    if not datasets:
        raise ValueError("no documents (after the split); give more text or another --split")
    identity = CacheIdentity(
        tokenizer_hash=table.hash,
        teacher_hash=teacher_hash,
        dtype=str(teacher.dtype).removeprefix("torch."),
        top_k=settings.top_k,
        context_tokens=settings.context_tokens,
        overlap_tokens=settings.overlap_tokens,
        shard_bytes=settings.shard_bytes,
        datasets=tuple((dataset.digest, dataset.documents.start, dataset.documents.stop) for dataset in datasets),
    )
    if world.is_main:
        with only_process(folder / LOCK_FILE, lambda holder: f"process {holder} is writing {folder}; wait for it"):
            return _make(folder, Maker(teacher, table, settings), datasets, identity, world, say)
    return _make(folder, Maker(teacher, table, settings), datasets, identity, world, say)


def _make(
    folder: Path,
    maker: Maker,
    datasets: Sequence[ByteTokenDataset],
    identity: CacheIdentity,
    world: World,
    say: Callable[[str], None],
) -> CacheReport:
    on_main_rank(world, lambda: _begin(folder, identity))
    sizes = [dataset.sizes() for dataset in datasets]
    shards = plan_shards(sizes, [dataset.documents.start for dataset in datasets], identity.shard_bytes)
    started, made_bytes = time.monotonic(), 0
    mine = [shard for shard in shards if shard.number % world.size == world.rank]
    left = [shard for shard in mine if shard.load(folder) is None]
    if len(left) < len(mine):
        say(f"{len(mine) - len(left)} of {len(mine)} shards are there already")
    for count, shard in enumerate(left, start=1):
        content, document_sizes, targets = maker.shard(datasets[shard.dataset], shard)
        write_shard(folder, content, document_sizes, targets)
        made_bytes += sum(document_sizes) - len(document_sizes)
        seconds = time.monotonic() - started
        size = (folder / f"{shard.name}.bin").stat().st_size / max(1, content.targets)
        say(
            f"{shard.name}: {content.targets:,} targets, {size:.1f} bytes each | {made_bytes / seconds:.0f} bytes/s | "
            f"ETA {duration((len(left) - count) * seconds / count)}"
        )
    of_all = torch.tensor([len(left), made_bytes])
    dist.all_reduce(of_all)  # ends when the slowest rank has made its share
    seconds = max(time.monotonic() - started, 1e-9)
    on_main_rank(world, lambda: _end(folder, shards))
    cache = TargetCache(folder)
    found = cache.shards
    targets_made, tokens = sum(shard.targets for shard in found), sum(shard.tokens for shard in found)
    return CacheReport(
        documents=sum(shard.stop - shard.first for shard in found),
        text_bytes=int(sum(int(lengths.sum()) for lengths in sizes)),
        cache_bytes=cache.size,
        shards=len(found),
        shards_made=int(of_all[0]),
        entries_per_target=sum(shard.entries for shard in found) / targets_made,
        replaced=sum(shard.replaced for shard in found) / targets_made,
        excluded=sum(shard.excluded for shard in found) / tokens,
        text_bytes_per_second=int(of_all[1]) / seconds,
    )


def _begin(folder: Path, identity: CacheIdentity) -> None:
    there = CacheIdentity.load(folder)
    if there is None:
        # a run that was killed here has left the partial file, which is written anew
        own = (LOCK_FILE, partial_path(folder / IDENTITY_FILE).name)
        if any(path.name not in own for path in folder.iterdir()):
            raise ValueError(f"{folder} is not empty and holds no target cache; give --logits-save-dir another folder")
        identity.save(folder)
    elif there != identity:
        raise ValueError(
            f"{folder} holds a target cache of something else ({'; '.join(there.differences(identity))}); give the "
            "same command to go on with it, or another --logits-save-dir"
        )


def _end(folder: Path, shards: Sequence[Shard]) -> None:
    missing = [shard.name for shard in shards if shard.load(folder) is None]
    if missing:
        raise ValueError(
            f"{folder}: {len(missing)} shards went missing, {missing[0]} first; start the same command again"
        )
    if not (folder / MANIFEST_FILE).exists():
        finish(folder, shards)
    TargetCache(folder).verify_all()
