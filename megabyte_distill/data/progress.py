"""How far preprocessing is: a bar on a terminal, Megatron's lines in a log."""

from __future__ import annotations

import datetime
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol, TextIO

from tqdm import tqdm


class Progress(Protocol):
    """Told after each batch."""

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
