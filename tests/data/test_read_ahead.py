"""Reading ahead: order, errors, how far, and what stops it."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator

import pytest

from megabyte_distill.data.read_ahead import read_ahead


def counted(made: list[int], count: int, closed: threading.Event) -> Generator[int, None, None]:
    try:
        for number in range(count):
            made.append(number)
            yield number
    finally:
        closed.set()


def test_items_come_in_order() -> None:
    assert list(read_ahead((n for n in range(1000)), lambda n: n * 1000, may_wait=False)) == list(range(1000))
    assert list(read_ahead((n for n in range(0)), lambda n: 1, may_wait=False)) == []


def test_it_is_ahead_by_so_many_bytes() -> None:
    made: list[int] = []
    closed = threading.Event()
    items = read_ahead(counted(made, 1000, closed), lambda n: 1 << 20, may_wait=False)
    assert next(items) == 0
    threading.Event().wait(0.2)  # time in which a reader without a limit would have made all
    assert len(made) <= 11  # eight MiB, one that waits for room, one taken, one more
    items.close()
    assert closed.is_set() and len(made) <= 12


def test_an_error_is_raised_behind_what_was_read_before_it() -> None:
    def failing() -> Generator[int, None, None]:
        yield 1
        raise ValueError("damaged")

    items = read_ahead(failing(), lambda n: 1, may_wait=False)
    assert next(items) == 1
    with pytest.raises(ValueError, match="damaged"):
        next(items)


def test_a_consumer_that_stops_does_not_wait_for_a_reader_that_may_wait() -> None:
    forever = threading.Event()

    def waiting() -> Generator[int, None, None]:
        yield 1
        forever.wait(60)
        yield 2

    items = read_ahead(waiting(), lambda n: 1, may_wait=True)
    assert next(items) == 1
    started = time.monotonic()
    items.close()
    assert time.monotonic() - started < 30
    forever.set()
