"""How far work is: a bar on a terminal, lines every so many seconds in a log, on stderr alone."""

from __future__ import annotations

import io
import sys
from contextlib import closing

import pytest

from megabyte_distill.data import progress
from megabyte_distill.data.progress import LINE_SECONDS, ProgressBar, counted, shown, silent


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    """Stands still until it is put forward."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_a_log_has_a_plain_line_every_so_many_seconds_and_a_last_one(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with closing(shown("export", 4_000_000)) as done:
        for seconds in (LINE_SECONDS - 1, 1, LINE_SECONDS / 2, LINE_SECONDS / 2):
            clock.now += seconds
            done.advance(1_000_000)
    with closing(shown("verify", 3, " documents")) as done:
        clock.now += LINE_SECONDS
        done.advance(2)
        done.advance()
    output = capsys.readouterr()
    assert output.out == "" and output.err.splitlines() == [
        "export: 50 %, 2.00MB of 4.00MB, 200kB/s, 00:10 left",
        "export: 100 %, 4.00MB of 4.00MB, 200kB/s, 00:00 left",
        "verify: 67 %, 2 documents of 3 documents,  0.20 documents/s, 00:05 left",
        "verify: 100 %, 3 documents of 3 documents,  0.30 documents/s, 00:00 left",
    ]


def test_what_takes_no_time_leaves_a_log_alone(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    for show in (shown, silent):
        with closing(show("import", 2)) as done:
            done.advance(2)
    clock.now += 2 * LINE_SECONDS
    with closing(silent("import", 2)) as done:
        done.advance(2)
    assert capsys.readouterr() == ("", "")


def test_a_terminal_has_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with closing(shown("import", 3000)) as done:
        done.advance(3000)
    bar = ProgressBar(500, stream=terminal)
    bar.update(documents=3, content=400, read=500)
    bar.close()
    text = terminal.getvalue()
    assert text.count("\r") >= 2 and "import: 100%|" in text and "3.00k/3.00k" in text
    assert "read: 100%|" in text and "3 documents" in text and capsys.readouterr().out == ""


def test_an_item_counts_when_the_next_is_asked_for() -> None:
    sizes: list[int] = []

    class Kept:
        def advance(self, count: int = 1) -> None:
            sizes.append(count)

        def close(self) -> None: ...

    items = counted(["a", "bcd"], Kept(), len)
    assert next(items) == "a" and not sizes
    assert list(items) == ["bcd"] and sizes == [1, 3]
