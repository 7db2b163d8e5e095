"""Signals as a flag that the loop reads between updates."""

from __future__ import annotations

import signal
import types
from collections.abc import Iterator
from contextlib import contextmanager


class StopRequest:
    """Remembers that somebody asked the run to stop, and who."""

    def __init__(self) -> None:
        self.received: str | None = None

    def __bool__(self) -> bool:
        return self.received is not None

    def _handle(self, number: int, frame: types.FrameType | None) -> None:
        if self.received is not None:  # the second time means it
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name


@contextmanager
def stop_request(enabled: bool = True) -> Iterator[StopRequest]:
    """Inside, SIGINT and SIGTERM set the yielded request; a second signal interrupts at once."""
    request = StopRequest()
    if not enabled:
        yield request
        return
    previous = {number: signal.signal(number, request._handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
