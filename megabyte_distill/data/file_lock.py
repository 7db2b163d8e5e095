"""A lock file: one process at a time, on one machine or on a file system that knows locks."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO


@contextlib.contextmanager
def only_process(lock: Path, refusal: Callable[[str], str]) -> Iterator[None]:
    """Inside, no other process holds ``lock``; the kernel lets go of it however this process ends.

    ValueError with ``refusal(id of the process that holds it)``. Where the file system knows no locks, nothing is
    checked. The file is removed at the end.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    with _locked(lock, refusal):
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def _locked(lock: Path, refusal: Callable[[str], str]) -> TextIO:
    while True:
        file = open(lock, "a+", encoding="utf-8")  # noqa: SIM115  the caller closes it, which lets go
        try:
            # lockf, not flock: a writer that outlives a killed job does not inherit it
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            with file:
                file.seek(0)
                raise ValueError(refusal(file.read().strip() or "unknown")) from None
        except OSError:  # no locks here
            return file
        if _is_still(lock, file):
            file.truncate(0)
            file.write(f"{os.getpid()}\n")
            file.flush()
            return file
        file.close()  # whoever held it has removed it since it was opened


def _is_still(path: Path, file: TextIO) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False
