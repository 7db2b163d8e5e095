"""One run, one job: two that write the same folder would mix their checkpoints."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

LOCK_FILE = ".lock"


@contextlib.contextmanager
def only_job(root: Path) -> Iterator[None]:
    """Inside, no other process holds ``root``; the kernel lets go of it however this process ends.

    ValueError names the process that holds it. Where the file system knows no locks, nothing is checked.
    """
    root.mkdir(parents=True, exist_ok=True)
    with open(root / LOCK_FILE, "a+", encoding="utf-8") as file:
        try:
            # lockf, not flock: a writer that outlives a killed job does not inherit it
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise ValueError(
                f"another job (process {holder}) is writing {root}; wait until it has ended or stop it, "
                "or give another --save"
            ) from None
        except OSError:  # no locks here
            yield
            return
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield
