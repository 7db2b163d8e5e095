"""How far a piece of work is, on stderr: a bar on a terminal, plain lines in a log.

Preprocessing has Megatron's lines, one every so many documents; all else a line every so many seconds.
"""

from __future__ import annotations

import datetime
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, TextIO, TypeVar

from tqdm import tqdm

LINE_SECONDS = 10.0
"""Between two lines in a log; work that takes less has none."""
_LINE = "{desc}: {percentage:.0f} %, {n_fmt}{unit} of {total_fmt}{unit}, {rate_noinv_fmt}, {remaining} left"

ItemT = TypeVar("ItemT")


class Counter(Protocol):
    """Told of every part of some work that is done; close it at the end."""

    def advance(self, count: int = 1) -> None:
        """So many more bytes, or whatever is counted, are done."""

    def close(self) -> None: ...


class Show(Protocol):
    """Makes the display of some work; :func:`shown` for people, :func:`silent` for programs."""

    def __call__(self, what: str, total: int, unit: str = "B") -> Counter:
        """``total``: of what is counted, in ``unit`` (a word with a space in front, or B for bytes)."""


class _Silent:
    def advance(self, count: int = 1) -> None:
        """Says nothing."""

    def close(self) -> None:
        """Nothing is left to say."""


class _Bar:
    def __init__(self, what: str, total: int, unit: str, stream: TextIO) -> None:
        self._bar: Any = tqdm(
            desc=what, total=total, unit=unit, unit_scale=unit == "B", file=stream, dynamic_ncols=True
        )

    def advance(self, count: int = 1) -> None:
        self._bar.update(count)

    def close(self) -> None:
        self._bar.close()


class _Lines:
    def __init__(self, what: str, total: int, unit: str, stream: TextIO) -> None:
        self._form: dict[str, Any] = {"prefix": what, "total": total, "unit": unit, "unit_scale": unit == "B"}
        self._stream, self._done, self._said = stream, 0, 0
        self._started = self._last = time.monotonic()

    def advance(self, count: int = 1) -> None:
        self._done += count
        if time.monotonic() - self._last >= LINE_SECONDS:
            self._say()

    def close(self) -> None:
        """The last line, where there were others."""
        if 0 < self._said < self._done:
            self._say()

    def _say(self) -> None:
        self._last, self._said = time.monotonic(), self._done
        elapsed = self._last - self._started
        print(tqdm.format_meter(self._done, elapsed=elapsed, bar_format=_LINE, **self._form), file=self._stream)
        self._stream.flush()


UNCOUNTED: Counter = _Silent()
"""For work that nobody watches."""


def silent(what: str, total: int, unit: str = "B") -> Counter:
    """Shows nothing."""
    return UNCOUNTED


def shown(what: str, total: int, unit: str = "B") -> Counter:
    """A bar where stderr is a terminal, else a line every :data:`LINE_SECONDS`."""
    return (_Bar if sys.stderr.isatty() else _Lines)(what, total, unit, sys.stderr)


def counted(items: Iterable[ItemT], counter: Counter, size: Callable[[ItemT], int]) -> Iterator[ItemT]:
    """The items; each is counted with its ``size`` when the next one is asked for."""
    for item in items:
        yield item
        counter.advance(size(item))


class Progress(Protocol):
    """How far preprocessing is; told after each batch."""

    def update(self, *, documents: int, content: int, read: int) -> None:
        """Documents and bytes of text so far; ``read``: input bytes so far, as they lie on the disk."""

    def close(self) -> None: ...


class ProgressLines:
    """A line every ``interval`` documents."""

    def __init__(self, total: int | None, interval: int, report: Callable[[str], None]) -> None:
        """``total``: input bytes, None where they are not known (standard input)."""
        self._total, self._interval, self._report = total, interval, report
        self._started = time.monotonic()
        self._reported = 0

    def update(self, *, documents: int, content: int, read: int) -> None:
        if documents // self._interval == self._reported // self._interval:
            return
        self._reported = documents
        seconds = max(time.monotonic() - self._started, 1e-9)
        line = f"Processed {documents} documents ({documents / seconds:.1f} docs/s, {content / seconds / 1e6:.2f} MB/s"
        if self._total and read:
            left = seconds * max(0, self._total - read) / read
            line += f", {100 * read / self._total:.0f} %, ETA {datetime.timedelta(seconds=round(left))}"
        self._report(line + ").")

    def close(self) -> None:
        """Nothing is left to say."""


class ProgressBar:
    """A bar over the input's bytes with documents/s and MB/s of text."""

    def __init__(self, total: int | None, stream: TextIO = sys.stderr) -> None:
        self._started = time.monotonic()
        self._bar: Any = tqdm(total=total, unit="B", unit_scale=True, file=stream, desc="read", dynamic_ncols=True)

    def update(self, *, documents: int, content: int, read: int) -> None:
        seconds = max(time.monotonic() - self._started, 1e-9)
        rates = f"{documents} documents, {documents / seconds:.0f}/s, text {content / seconds / 1e6:.2f} MB/s"
        self._bar.set_postfix_str(rates, refresh=False)
        self._bar.update(read - self._bar.n)

    def close(self) -> None:
        self._bar.close()
