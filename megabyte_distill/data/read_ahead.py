"""A thread that reads ahead of its consumer, by so many bytes."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator
from typing import Generic, TypeVar

T = TypeVar("T")
_MOST_BYTES = 8 << 20


def read_ahead(
    items: Generator[T, None, None], size: Callable[[T], int], *, may_wait: bool
) -> Generator[T, None, None]:
    """The items, made by a thread that is ahead by 8 MiB (``size`` says how many bytes one is) or by one item.

    Its errors are raised here. ``may_wait``: it may wait for another process, so that a consumer that stops early must
    not wait for it.
    """
    shelf: _Shelf[T] = _Shelf()

    def read() -> None:
        error = None
        try:
            for item in items:
                if not shelf.put(item, size(item)):
                    break
            items.close()
        except BaseException as raised:
            error = raised
        shelf.end(error)

    thread = threading.Thread(target=read, name="read ahead", daemon=True)
    thread.start()
    try:
        yield from iter(shelf.take, None)
    finally:
        shelf.refuse()
        if not may_wait:
            thread.join()


class _Shelf(Generic[T]):
    """Items in order between two threads; room for more while they are below the most bytes."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._items: deque[tuple[T, int]] = deque()
        self._bytes = 0
        self._is_ended = self._is_refused = False
        self._error: BaseException | None = None

    def put(self, item: T, size: int) -> bool:
        """Waits for room; False where no more is wanted."""
        with self._changed:
            self._changed.wait_for(lambda: self._bytes < _MOST_BYTES or self._is_refused)
            self._items.append((item, size))
            self._bytes += size
            self._changed.notify()
            return not self._is_refused

    def take(self) -> T | None:
        """Waits for an item; None behind the last. Raises what ended the other side."""
        with self._changed:
            self._changed.wait_for(lambda: self._items or self._is_ended)
            if self._items:
                item, size = self._items.popleft()
                self._bytes -= size
                self._changed.notify()
                return item
        if self._error is not None:
            raise self._error
        return None

    def end(self, error: BaseException | None) -> None:
        """Nothing follows."""
        with self._changed:
            self._is_ended, self._error = True, error
            self._changed.notify()

    def refuse(self) -> None:
        """Nothing more is wanted."""
        with self._changed:
            self._is_refused = True
            self._changed.notify()
