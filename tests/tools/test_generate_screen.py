"""tools/generate.py: what a terminal or a pipe is shown, of texts that are known beforehand, and when."""

from __future__ import annotations

import io
import os
import pty
import re
import select
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

from megabyte_distill.inference.generation import Generated, GenerationSettings, NewBytes
from tools.generate import Screen, interact


@dataclass
class Written:
    """A continuation of one prompt that is known beforehand."""

    prompts: list[bytes]
    text: bytes
    told: Callable[[int], object] = bool
    """Of each byte's place, when it is written."""
    made: int = 0

    def __iter__(self) -> Iterator[NewBytes]:
        for place, byte in enumerate(self.text):
            self.made += 1
            self.told(place)
            yield NewBytes(rows=[0], byte_ids=[byte], bits=[False], log_probabilities=[0.0])

    @property
    def prompt_bits(self) -> list[tuple[bool, ...]]:
        return [row.prompt_bits for row in self.results()]

    def results(self) -> list[Generated]:
        # chunks of five new bytes
        bits, prompt_bits = tuple(place % 5 == 4 for place in range(self.made)), (True,) * len(self.prompts[0])
        text = self.text[: self.made]
        return [Generated(byte_ids=text, bits=bits, prompt_bits=prompt_bits, log_probability=0.0, ended=True)]


class Shown(io.TextIOWrapper):
    """A terminal, or a pipe."""

    def __init__(self, *, is_terminal: bool) -> None:
        super().__init__(io.BytesIO(), encoding="utf-8", errors="surrogateescape")
        self.is_terminal = is_terminal
        self.shown: list[str] = []

    def write(self, text: str) -> int:
        self.shown.append(text)
        return super().write(text)

    def isatty(self) -> bool:
        return self.is_terminal

    def text(self) -> bytes:
        """What has been flushed."""
        buffer = self.buffer
        assert isinstance(buffer, io.BytesIO)
        return buffer.getvalue()


@pytest.mark.parametrize("streams", [True, False])
@pytest.mark.parametrize(
    ("prompt", "new", "on_terminal", "told"),
    [
        (b"caf\xc3", b"\xa9 \xe6\x97\xa5", "café 日", "5 bytes in 0.0 s"),
        (b"a\xff\x80b", b"c", "a��bc", "1 byte in 0.0 s"),
        (b"half \xe6\x97", b"", "half �", "new bytes: valid UTF-8, 1 of 1 ended by the model"),
        (b"half \xe6\x97", b"x\x80\xe6", "half �x��", "new bytes: 2 of 3 (66.7 %) belong to no character"),
        ("\0né👩🏽".encode(), "\u200d🚀 مر".encode(), "\0né👩🏽\u200d🚀 مر", "new bytes: valid UTF-8"),
    ],
)
def test_a_pipe_gets_the_bytes_and_a_terminal_a_sign_for_what_is_no_text(
    streams: bool,
    prompt: bytes,
    new: bytes,
    on_terminal: str,
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    screen = Screen(lambda *_: Written([prompt], new), GenerationSettings(), with_boundaries=False)
    for is_terminal, wanted in ((False, prompt + new), (True, on_terminal.encode())):
        shown = Shown(is_terminal=is_terminal)
        with monkeypatch.context() as patched:
            patched.setattr("sys.stdout", shown)
            if streams:
                screen.stream(prompt, 0)
            else:
                screen.show([prompt], 0, 1)
        assert shown.text() == wanted + b"\n"
        screen.report()
        assert told in capsys.readouterr().err


@pytest.mark.parametrize("is_terminal", [True, False])
@pytest.mark.parametrize("with_boundaries", [True, False])
def test_a_character_is_shown_as_soon_as_its_last_byte_is_there(
    is_terminal: bool, with_boundaries: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt, new = b"caf\xc3", b"\xa9 " + "日🙂é!".encode()
    shown, seen = Shown(is_terminal=is_terminal), []
    monkeypatch.setattr("sys.stdout", shown)
    written = Written([prompt], new, told=lambda _: seen.append(shown.text().decode()))
    Screen(lambda *_: written, GenerationSettings(), with_boundaries=with_boundaries).stream(prompt, 0)
    wanted = [(prompt + new[:size]).decode("utf-8", "ignore") for size in range(len(new))]
    marks = re.compile(r"\x1b\[[\d;]*m|[|¦]")
    assert [marks.sub("", text) for text in seen] == wanted
    assert marks.sub("", "".join(shown.shown)) == (prompt + new).decode() + "\n"


def test_the_figures_are_those_of_the_clock_and_of_the_boundaries(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([100.0, 102.5, 200.0, 201.5])
    monkeypatch.setattr("tools.generate.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    screen = Screen(lambda prompts, *_: Written(list(prompts), b"x" * 20), GenerationSettings(), with_boundaries=False)
    screen.stream(b"ab", 0)
    screen.show([b"c"], 1, 2)
    screen.report()
    # three chunks of a byte in the prompts, and four in each of the texts
    assert "40 bytes in 4.0 s (10 bytes/s), 3.91 bytes per chunk, prompts included" in capsys.readouterr().err
    screen.report()
    assert not capsys.readouterr().err


@pytest.mark.parametrize("with_boundaries", [True, False])
def test_the_clock_runs_from_where_the_prompt_is_shown(
    with_boundaries: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A second for each character that is shown."""
    shown = Shown(is_terminal=False)
    monkeypatch.setattr("sys.stdout", shown)
    clock = SimpleNamespace(perf_counter=lambda: float(len("".join(shown.shown))))
    monkeypatch.setattr("tools.generate.time", clock)
    written = Written([b"a prompt"], b"xyz")
    screen = Screen(lambda *_: written, GenerationSettings(), with_boundaries=with_boundaries)
    screen.stream(b"a prompt", 0)
    screen.report()
    assert "3 bytes in 3.0 s" in capsys.readouterr().err


def _interrupt_at(last: int) -> Callable[[int], None]:
    def told(place: int) -> None:
        if place == last:
            raise KeyboardInterrupt

    return told


@pytest.mark.parametrize("with_boundaries", [True, False])
@pytest.mark.parametrize("streams", [True, False])
@pytest.mark.parametrize("new", [b"xyEND", b"xy\xe6\x97", b"END", b""])
def test_ctrl_c_shows_what_is_counted_and_held_back(
    new: bytes,
    streams: bool,
    with_boundaries: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    written = Written([b"a"], new + b"!", told=_interrupt_at(max(len(new) - 1, 0)))
    settings = GenerationSettings(stop=(b"END!",))
    screen = Screen(lambda *_: written, settings, with_boundaries=with_boundaries)
    shown = Shown(is_terminal=False)
    monkeypatch.setattr("sys.stdout", shown)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a\n")))
    interact(screen, streams=streams)
    text = b"a" + (new or b"!")
    wanted = text.decode("utf-8", "replace").encode() if with_boundaries else text
    assert shown.text().replace(b"|", b"").replace("¦".encode(), b"") == wanted + b"\n"
    assert f"{len(new or b'!')} byte" in capsys.readouterr().err


def test_ctrl_c_while_a_prompt_is_read_reports_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def begin(*_: object) -> Written:
        raise KeyboardInterrupt

    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a\n")))
    interact(Screen(begin, GenerationSettings(), with_boundaries=False), streams=True)
    output = capsys.readouterr()
    assert not output.out and "bytes in" not in output.err


@pytest.mark.parametrize("streams", [True, False])
def test_prompts_are_named_by_their_number_among_all(streams: bool, capsys: pytest.CaptureFixture[str]) -> None:
    named: list[Sequence[str]] = []

    def begin(prompts: Sequence[bytes], _: object, names: Sequence[str]) -> Written:
        named.append(names)
        return Written(list(prompts), b"x")

    screen = Screen(begin, GenerationSettings(), with_boundaries=False)
    if streams:
        screen.stream(b"a", 9, 20)
    else:
        screen.show([b"a"], 9, 20)
    assert named == [["prompt 10 of 20"]]
    assert capsys.readouterr().out == "--- prompt 10 of 20 ---\nax\n"


_NOTE_PROMPTS = """
import sys
from tools.generate import interact
class Noting:
    def stream(self, prompt, turn):
        with open(sys.argv[1], "a") as file:
            print(turn, prompt, file=file)
        print("noted", prompt[:1].decode("latin-1").encode("ascii", "replace").decode())
    def report(self):
        pass
interact(Noting(), streams=True)
"""


@contextmanager
def _typing(locale: str, notes: Path) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """The keyboard of a terminal in which prompts are noted, and the process there."""
    keyboard, terminal = pty.openpty()
    try:
        with subprocess.Popen(
            [sys.executable, "-c", _NOTE_PROMPTS, str(notes)],
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            env={**os.environ, "LC_ALL": locale, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        ) as process:
            try:
                yield keyboard, process
                assert process.wait(60) == 0
            finally:
                process.kill()
    finally:
        os.close(keyboard)
        os.close(terminal)


@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_every_line_typed_into_a_terminal_is_a_prompt_byte_for_byte(locale: str, tmp_path: Path) -> None:
    lines = [b"half \xe6\x97", b"\xc3", b"", "日本 né".encode(), b"a\xffb", b" /foo", b"\xe2\x80"]
    with _typing(locale, tmp_path / "prompts") as (keyboard, _):
        os.write(keyboard, b"".join(line + b"\n" for line in lines) + b"\x04")
    noted = (tmp_path / "prompts").read_text().splitlines()
    assert noted == [f"{turn} {line!r}" for turn, line in enumerate(lines)]


def test_a_line_that_a_terminal_cuts_is_no_prompt(tmp_path: Path) -> None:
    seen = b""
    with _typing("C.UTF-8", tmp_path / "prompts") as (keyboard, _):
        for line in (b"x" * 6000, b"y" * 4094, b"z"):
            os.write(keyboard, line + b"\n")
            told = b"the line has 4095 bytes" if line[:1] == b"x" else b"noted " + line[:1]
            while told not in seen:
                assert select.select([keyboard], [], [], 60)[0], (told, seen)
                seen += os.read(keyboard, 1 << 16)
        os.write(keyboard, b"\x04")
    noted = (tmp_path / "prompts").read_text().splitlines()
    assert noted == [f"0 {b'y' * 4094!r}", "1 b'z'"]
    assert b"with --prompt-file" in seen
