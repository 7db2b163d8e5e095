"""One run, one job: two that write the same folder would mix their checkpoints."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

from megabyte_distill.data.file_lock import only_process

LOCK_FILE = ".lock"


def only_job(root: Path) -> AbstractContextManager[None]:
    """Inside, no other process holds ``root``. ValueError names the process that does."""
    return only_process(
        root / LOCK_FILE,
        lambda holder: (
            f"another job (process {holder}) is writing {root}; wait until it has ended or stop it, or give another "
            "--save"
        ),
    )
