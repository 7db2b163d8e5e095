"""Other ranks that have died or hang: noticed, named with every rank's last position, and no rank waits for ever.

Three ways lead to one message. gloo raises in whoever waits for a rank that is gone, and after the timeout. Where a
rank hangs outside of any exchange (or in NCCL, which raises nothing), a thread beside the training sees that another
rank of this machine is gone and ends the process. And shortly before the timeout the main rank says where everyone is.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch.distributed as dist

from megabyte_distill import exit_codes
from megabyte_distill.parallel.positions import (
    CLOSING,
    ENDED,
    FOLDER,
    LOST,
    Position,
    Record,
    furthest_behind,
    read_positions,
    table,
)
from megabyte_distill.parallel.process_groups import World, on_main_rank

_INTERVAL = 0.5
_GRACE = 5.0
"""Seconds in which a rank may notice by itself that another one is gone, before its process is ended."""
_GRACE_OF_ERRORS = 30.0
"""Seconds in which a process that failed by itself may say so, finish what it writes and leave."""
_BLAME_WAIT = 2.0
_SHARE_OF_TIMEOUT = 0.9
_WORDS = ("connection", "timed out", "timeout", "gloo", "nccl", "broken pipe", "by peer")


class PeerLost(RuntimeError):
    """An exchange between ranks failed. Who is to blame and where everyone is has been reported."""


Report = Callable[[str, bool], None]
"""Gets a message, and whether this rank is the one to print it."""


def is_lost_contact(error: BaseException) -> bool:
    """Whether an error of torch says that another rank did not answer."""
    if isinstance(error, dist.DistError):
        return True
    # gloo has no error of its own
    return type(error) is RuntimeError and any(word in str(error).lower() for word in _WORDS)


@contextlib.contextmanager
def watched(root: Path, world: World, timeout: float, report: Report) -> Iterator[Position]:
    """Inside, this rank's position is recorded under ``root`` and its neighbours are watched. Collective.

    An error that means lost contact is reported and leaves as :class:`PeerLost`; others leave as they are, and are in
    the record. ``timeout``: seconds that an exchange may take.
    """
    folder = root / FOLDER

    def new_folder() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)

    on_main_rank(world, new_folder)
    position = Position(folder, world.rank)
    watch = _Watch(folder, world, position, timeout, report)
    if world.size > 1:
        watch.start()
    try:
        yield position
    except RuntimeError as error:
        if world.size == 1 or not is_lost_contact(error):
            position.end(f"{type(error).__name__}: {error}")
            raise
        position.end(LOST)
        watch.report_lost(error)
        _leave_within(_GRACE)
        raise PeerLost("lost contact with another rank") from error
    except BaseException as error:
        position.end(f"{type(error).__name__}: {error}")
        if world.size > 1:  # the others may wait in an exchange with this rank
            _leave_within(_GRACE_OF_ERRORS)
        raise
    else:
        position.end(ENDED)
    finally:
        watch.stop()
        position.close()


def _leave_within(seconds: float) -> None:
    """Taking down process groups may wait for ranks that are gone, or that wait for this one."""
    timer = threading.Timer(seconds, os._exit, (exit_codes.FAILURE,))
    timer.daemon = True
    timer.start()


class _Watch(threading.Thread):
    def __init__(self, folder: Path, world: World, position: Position, timeout: float, report: Report) -> None:
        super().__init__(name="watch", daemon=True)
        self._folder, self._world, self._position, self._report = folder, world, position, report
        self._timeout = timeout
        self._neighbours = _neighbours(world)
        self._stopped = threading.Event()

    def stop(self) -> None:
        """Returns when the thread has ended."""
        self._stopped.set()
        if self.is_alive():
            self.join()

    def run(self) -> None:
        gone_since: float | None = None
        told: Record | None = None
        while not self._stopped.wait(_INTERVAL):
            # only this machine's: reading all ranks' files all the time would be too much for a file system
            gone = self._gone(read_positions(self._folder, self._neighbours))
            gone_since = (gone_since or time.monotonic()) if gone else None
            if gone_since is not None and time.monotonic() - gone_since > _GRACE:
                self._report(self._explanation("another rank is gone, and this one did not notice"), True)
                sys.stdout.flush()
                os._exit(exit_codes.FAILURE)
            record = self._position.record
            # the closing report is one rank's work: it exchanges nothing and may take its time
            is_alone = record.phase == CLOSING
            waits = not is_alone and time.time() - record.since > _SHARE_OF_TIMEOUT * self._timeout
            if waits and self._world.is_main and record is not told:
                told = record
                share = f"{_SHARE_OF_TIMEOUT:.0%} of --distributed-timeout-minutes {self._timeout / 60:g}"
                text = table(self._everyone(), self._world.size)
                print(f"warning: no progress for {share}; {text}", file=sys.stderr, flush=True)

    def report_lost(self, error: RuntimeError) -> None:
        """Say what an exchange's error means. Waits a moment for the rank that is to blame to be known."""
        deadline = time.monotonic() + _BLAME_WAIT
        while not self._culprits(self._everyone()) and time.monotonic() < deadline:
            time.sleep(0.05)
        lines = str(error).strip().splitlines() or [type(error).__name__]
        records = self._everyone()
        out = {*self._gone(records), *(rank for rank, record in records.items() if record.has_failed)}
        out = out or set(furthest_behind(records))  # a rank that hangs says nothing
        speaker = min((rank for rank in range(self._world.size) if rank not in out), default=0)
        self._report(self._explanation(lines[0][:200]), self._world.rank == speaker)

    def _explanation(self, symptom: str) -> str:
        records = self._everyone()
        causes = self._culprits(records) or ["no rank of this machine is known to have died or failed"]
        return f"{'; '.join(causes)} ({symptom})\n{table(records, self._world.size)}"

    def _culprits(self, records: dict[int, Record]) -> list[str]:
        causes = [f"rank {rank} failed: {record.outcome}" for rank, record in records.items() if record.has_failed]
        for rank in self._gone(records):
            record = records.get(rank, Record())
            if not record.outcome:
                causes.append(
                    f"rank {rank} (pid {self._neighbours[rank]}) died without a word (killed, perhaps for want of "
                    f"memory, or crashed) at {record.where()}"
                )
        return causes

    def _everyone(self) -> dict[int, Record]:
        return read_positions(self._folder, range(self._world.size))

    def _gone(self, records: dict[int, Record]) -> list[int]:
        """Ranks of this machine whose process is gone before its work was done."""
        dead = [rank for rank, pid in self._neighbours.items() if not _is_running(pid)]
        return [rank for rank in dead if rank not in records or records[rank].outcome != ENDED]


def _neighbours(world: World) -> dict[int, int]:
    """Process id of each other rank whose processes this one can see."""
    namespace = Path("/proc/self/ns/pid")
    place = (socket.gethostname(), os.readlink(namespace) if namespace.exists() else "")
    everyone: list[tuple[tuple[str, str], int]] = [(("", ""), 0)] * world.size
    dist.all_gather_object(everyone, (place, os.getpid()))
    return {rank: pid for rank, (where, pid) in enumerate(everyone) if where == place and rank != world.rank}


def _is_running(pid: int) -> bool:
    """False also for a process that has ended and whose parent has not asked yet."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return not Path("/proc/self/stat").exists()
    return status.rpartition(")")[2].split()[0] not in ("Z", "X")
