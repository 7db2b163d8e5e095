"""Where each rank is: a small file a rank in the run's folder, written at every part of an update, read after a fault.

A file, because it outlives its process whatever ended that: the other ranks still read where it was. On one machine
what is read is exact to the step; over a network file system it may be some seconds old.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

FOLDER = ".ranks"
CLOSING = "closing report"
_RECORD_BYTES = 1024
_ORDER = (
    "start",
    "load",
    "data",
    "count",
    "forward",
    "backward",
    "reduce",
    "step",
    "evaluate",
    "save",
    CLOSING,
)
_BY_MICRO_BATCH = ("forward", "backward")


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What a rank last said of itself."""

    pid: int = 0
    host: str = ""
    stage: str = ""
    iteration: int = 0
    """The update that it works on, counted from 1."""
    phase: str = "start"
    micro_batch: int = -1
    since: float = 0.0
    """time.time() at which the phase began."""
    outcome: str = ""
    """Empty while the rank runs; then ``ended``, ``lost contact``, or what it failed with."""

    @property
    def has_failed(self) -> bool:
        """Whether the rank stopped for a reason of its own."""
        return self.outcome not in ("", ENDED, LOST)

    @property
    def progress(self) -> tuple[str, int, int, int, int]:
        """Grows while a rank trains; stages are named in the order in which they run."""
        place = _ORDER.index(self.phase)
        inside = self.phase in _BY_MICRO_BATCH
        first = _ORDER.index(_BY_MICRO_BATCH[0]) if inside else place
        return (self.stage, self.iteration, first, self.micro_batch if inside else 0, place)

    def where(self) -> str:
        """``stage 1a iteration 7, backward of micro-batch 0``."""
        update = f"stage {self.stage} iteration {self.iteration}, " if self.stage and self.iteration else ""
        of = f" of micro-batch {self.micro_batch}" if self.phase in _BY_MICRO_BATCH else ""
        return f"{update}{self.phase}{of}"

    def line(self, now: float) -> str:
        """With process, host, how long, and how it ended."""
        outcome = f"; {self.outcome}" if self.outcome else ""
        return f"{self.where()}, for {max(0.0, now - self.since):.1f} s (pid {self.pid} on {self.host}){outcome}"


_NAMES = tuple(field.name for field in fields(Record))
ENDED = "ended"
LOST = "lost contact with another rank"


class Position:
    """This rank's own record. Without a folder it is kept in memory only."""

    def __init__(self, folder: Path | None = None, rank: int = 0) -> None:
        self.record = Record(pid=os.getpid(), host=socket.gethostname(), since=time.time())
        self._file = None if folder is None else os.open(_path(folder, rank), os.O_WRONLY | os.O_CREAT, 0o644)
        self._write()

    def begin(self, stage: str, iteration: int, phase: str) -> None:
        """From here on this rank works on update ``iteration`` (from 1; 0: before the first) of a stage."""
        self.record = replace(
            self.record, stage=stage, iteration=iteration, phase=phase, micro_batch=-1, since=time.time()
        )
        self._write()

    def at(self, phase: str, micro_batch: int = -1) -> None:
        """The next part of the same update begins."""
        self.record = replace(self.record, phase=phase, micro_batch=micro_batch, since=time.time())
        self._write()

    def end(self, outcome: str) -> None:
        """The last word: ``ended``, ``lost contact``, or an error."""
        self.record = replace(self.record, outcome=" ".join(outcome.split())[:300])
        self._write()

    def close(self) -> None:
        """The file stays, for whoever asks."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _write(self) -> None:
        if self._file is not None:
            text = (
                json.dumps({name: getattr(self.record, name) for name in _NAMES})
                .encode()
                .ljust(_RECORD_BYTES)[:_RECORD_BYTES]
            )
            # where the run's disk is full or gone, training has its own error to raise
            with contextlib.suppress(OSError):
                os.pwrite(self._file, text, 0)


def read_positions(folder: Path, ranks: Iterable[int]) -> dict[int, Record]:
    """Rank → its record; a rank that has not written one yet is missing."""
    found = {}
    for rank in ranks:
        try:
            found[rank] = Record(**json.loads(_path(folder, rank).read_bytes()))
        except (OSError, ValueError, TypeError):  # not there yet, or just being written
            continue
    return found


def table(records: Mapping[int, Record], size: int) -> str:
    """A line a rank, and who is furthest behind where one is."""
    now = time.time()
    lines = [f"  rank {rank}: {records[rank].line(now) if rank in records else 'nothing'}" for rank in range(size)]
    behind = furthest_behind(records)
    hint = [f"furthest behind: rank {', '.join(map(str, behind))}"] if behind else []
    return "\n".join(["where the ranks are:", *lines, *hint])


def furthest_behind(records: Mapping[int, Record]) -> list[int]:
    """Ranks that have come less far than others, of those that have not ended; empty where all are as far."""
    running = {rank: record.progress for rank, record in records.items() if record.outcome != ENDED}
    least = min(running.values(), default=None)
    behind = [rank for rank, progress in running.items() if progress == least]
    return behind if len(behind) < len(running) else []


def _path(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank:05d}.json"
