"""megatron's helper processes during a save, kept from outliving a killed job and from failing a stopped one."""

from __future__ import annotations

import ctypes
import os
import queue
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from megatron.core.dist_checkpointing.strategies import filesystem_async

_PR_SET_PDEATHSIG = 1


@contextmanager
def tied_to_this_process() -> Iterator[None]:
    """Around a save. Megatron forks its writers, and a writer whose parent was killed may wait for ever: here the
    kernel ends it with the parent (Linux only). Results come back through a queue of this process.

    Megatron would start a manager process for that queue, which only saving in the background needs. A SIGTERM to the
    process group, which is what torchrun sends, ends that process, and the save that the signal asked for fails.
    """
    if "_results_queue" in vars(filesystem_async) and filesystem_async._results_queue is None:
        filesystem_async._results_queue = queue.Queue()
    parents = _parents_of_writers()
    parents.append(os.getpid())
    try:
        yield
    finally:
        parents.pop()


@cache
def _parents_of_writers() -> list[int]:
    """Process ids that are saving now; whoever they fork meanwhile dies with them. The hook is set only once."""
    parents: list[int] = []
    if not sys.platform.startswith("linux"):
        return parents
    libc = ctypes.CDLL(None)

    def after_fork_in_child() -> None:
        if parents:
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parents[-1]:  # it died before the line above
                os._exit(1)

    os.register_at_fork(after_in_child=after_fork_in_child)
    return parents
