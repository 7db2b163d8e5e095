"""tools/generate.py: what it prints, and one line and exit code 2 for every mistake."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

from megabyte_distill.config.stage import STAGE_ORDER
from megabyte_distill.hf.exported_folder import load_exported
from megabyte_distill.inference.generation import (
    Generated,
    GenerationMode,
    GenerationSettings,
    NewBytes,
    PromptReading,
    generate,
)
from megabyte_distill.inference.sampling import Sampling
from megabyte_distill.inference.utf8 import Utf8Mode
from megabyte_distill.parallel.process_groups import world
from megabyte_distill.runs import load_student
from tools.convert_checkpoint import main as convert
from tools.generate import Screen, build_parser, main, settings_of


@pytest.fixture(scope="module")
def exported(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished run as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("export") / "folder"
    assert convert(["export", "--megatron-path", str(finished), "--hf-path", str(folder)]) == 0
    return folder


def test_a_seed_gives_the_text_of_the_api_from_a_prompt_and_from_a_file(
    finished: Path, tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    (tmp_path / "prompt").write_bytes(b"the old")
    command = ["--load", str(finished), "--max-new-bytes", "20", "--temperature", "0.5"]
    seen = set()
    with world():
        student = load_student(str(finished)).student
        for seed in range(7, 12):
            settings = GenerationSettings(max_new_bytes=20, sampling=Sampling(temperature=0.5), seed=seed)
            # an untrained model's bytes are often no UTF-8, or none at all: they are counted, whatever is shown
            wanted = generate(student, ["the old"], settings)[0].byte_ids
            for prompt in (["--prompt", "the old"], ["--prompt-file", str(tmp_path / "prompt")]):
                assert main([*command, *prompt, "--seed", str(seed)]) == 0
                output = capsysbinary.readouterr()
                assert output.out == b"the old" + wanted + b"\n"
                assert f"{len(wanted)} bytes in ".encode() in output.err and b"bytes/s" in output.err
            seen.add(wanted)
    assert len(seen) > 1


def test_boundaries_are_shown(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--load", str(finished), "--prompt", "the", "--max-new-bytes", "30", "--show-boundaries"]
    with world():
        assert main(command) == 0
        streamed = capsys.readouterr()
        assert main([*command, "--no-stream"]) == 0
        assert capsys.readouterr().out == streamed.out
        assert main([*command, "--generation", "bytes"]) == 0
    output = capsys.readouterr()
    for shown in (streamed, output):
        assert "|" in shown.out and shown.out.replace("|", "").replace("¦", "").startswith("the")
        assert "bytes per chunk" in shown.err


def test_a_threshold_says_how_long_chunks_become(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    marks = []
    for threshold, more in (("0.001", []), ("0.999", []), ("0.999", ["--speculate", "4"])):
        command = ["--load", str(exported), "--prompt", "the", "--max-new-bytes", "30", "--show-boundaries", *more]
        assert main([*command, "--boundary-threshold", threshold]) == 0
        marks.append(capsys.readouterr().out.count("|"))
    assert marks[0] > 25 and marks[1] < 5 and marks[2] == marks[1]


def test_prompts_are_labelled_and_their_texts_do_not_depend_on_who_runs_beside_them(
    exported: Path, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    command = ["--load", str(exported), "--max-new-bytes", "12", "--seed", "3", "--utf8", "constrain"]
    for prompt in ("the", "", "né", "old house"):
        command += ["--prompt", prompt]
    outputs = []
    for more in ([], ["--batch-size", "3"], ["--stream"]):
        assert main([*command, *more]) == 0
        output = capsysbinary.readouterr()
        outputs.append(output.out)
        assert b"new bytes: valid UTF-8" in output.err
    assert outputs[0] == outputs[1] == outputs[2]
    parts = outputs[0].split(b"--- prompt ")
    assert [part[:6] for part in parts[1:]] == [f"{number} of 4".encode() for number in range(1, 5)]
    assert parts[3].startswith("3 of 4 ---\nné".encode()) and parts[4].startswith(b"4 of 4 ---\nold house")


def test_an_export_writes_what_its_run_does(
    finished: Path, exported: Path, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    outputs = []
    for folder in (finished, finished / "2b", exported):
        with world():
            assert main(["--load", str(folder), "--prompt", "the", "--max-new-bytes", "24", "--temperature", "0"]) == 0
        outputs.append(capsysbinary.readouterr().out)
    assert outputs[0] == outputs[1] == outputs[2]


@pytest.mark.parametrize(
    ("stored", "flags", "wanted"),
    [
        (0.7, [], 0.7),
        (0.7, ["--boundary-threshold", "0.2"], 0.2),
        (0.7, ["--boundary-threshold", "none"], None),
        (0.7, ["--generation", "bytes"], None),
        (None, [], None),
    ],
)
def test_an_exports_threshold_holds_unless_another_or_none_is_given(
    tmp_path: Path, stored: float | None, flags: list[str], wanted: float | None
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "megabyte", "boundary_threshold": stored}))
    arguments = build_parser().parse_args(["--load", str(tmp_path), "--prompt", "a", *flags])
    assert settings_of(arguments).sampling.boundary_threshold == wanted


def test_every_flag_reaches_its_place(tmp_path: Path) -> None:
    """No two values are alike, so that none can stand in another's place."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "megabyte"}))
    command = ["--load", str(tmp_path), "--prompt", "a"]
    words = "--temperature 0.3 --top-p 0.4 --top-k 5 --min-p 0.6 --boundary-threshold 0.7 --max-new-bytes 8 --paths 9 "
    words += "--path-window 10 --seed 11 --stop x --stop é --utf8 constrain"
    assert settings_of(build_parser().parse_args([*command, *words.split()])) == GenerationSettings(
        max_new_bytes=8,
        sampling=Sampling(temperature=0.3, top_p=0.4, top_k=5, min_p=0.6, boundary_threshold=0.7),
        paths=9,
        path_window=10,
        seed=11,
        stop=(b"x", "é".encode()),
        utf8=Utf8Mode.CONSTRAIN,
    )
    for flags, fields in (
        ([], {}),
        (["--scoring", "official"], {"reading": PromptReading.OFFICIAL}),
        (["--generation", "bytes"], {"mode": GenerationMode.BYTES}),
    ):
        assert settings_of(build_parser().parse_args([*command, *flags])) == GenerationSettings(**fields)


@pytest.mark.parametrize(
    "flags",
    [
        ["--scoring", "official"],
        ["--generation", "bytes"],
        ["--temperature", "3", "--top-p", "0.2"],
        ["--temperature", "3", "--top-k", "2"],
        ["--temperature", "3", "--min-p", "0.5"],
        ["--paths", "1", "--path-window", "1"],
    ],
)
def test_what_is_written_is_what_the_settings_give(
    exported: Path, flags: list[str], capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    command = ["--load", str(exported), "--prompt", "the old house", "--max-new-bytes", "16", *flags]
    [wanted] = generate(
        load_exported(exported, "cpu"), ["the old house"], settings_of(build_parser().parse_args(command))
    )
    assert main(command) == 0
    assert capsysbinary.readouterr().out == b"the old house" + wanted.byte_ids + b"\n"


def test_a_stop_text_and_a_seed_reach_the_engine(exported: Path, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    command = ["--load", str(exported), "--prompt", "the", "--max-new-bytes", "40", "--utf8", "constrain"]
    for seed in range(20):  # until one has something to stop at
        assert main([*command, "--seed", str(seed)]) == 0
        whole = capsysbinary.readouterr().out.removesuffix(b"\n")
        if len(whole) > 8:
            break
    stop = whole[6:8].decode("utf-8", "surrogateescape")
    assert main([*command, "--seed", str(seed), "--stop", "no such text", "--stop", stop]) == 0
    output = capsysbinary.readouterr()
    assert output.out == b"the" + whole[3:].split(whole[6:8])[0] + b"\n"
    assert b"1 ended by --stop" in output.err


def test_prompts_are_read_from_the_terminal_until_it_ends(
    exported: Path, capsysbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["--load", str(exported), "--max-new-bytes", "6", "--temperature", "0"]
    assert main([*command, "--prompt", "the"]) == 0
    wanted = capsysbinary.readouterr().out
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"the\n/help\nb\xffd\nthe"), "ascii"))
    assert main([*command, "--interactive"]) == 0
    output = capsysbinary.readouterr()
    assert output.out == wanted * 2
    assert output.err.count(b"Ctrl-D ends") == 2
    assert b"error: the prompt has byte 255 (0xFF) at offset 1" in output.err
    assert output.err.count(b"bytes/s") == 2


_NOTE_PROMPTS = """
import sys
from tools.generate import interact
class Noting:
    def stream(self, prompt, turn):
        with open(sys.argv[1], "a") as file:
            print(turn, prompt, file=file)
    def report(self):
        pass
interact(Noting(), streams=True)
"""


@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_every_line_typed_into_a_terminal_is_a_prompt_byte_for_byte(locale: str, tmp_path: Path) -> None:
    lines = [b"half \xe6\x97", b"\xc3", b"", "日本 né".encode(), b"a\xffb", b" /foo", b"\xe2\x80"]
    keyboard, terminal = pty.openpty()
    try:
        os.write(keyboard, b"".join(line + b"\n" for line in lines) + b"\x04")
        subprocess.run(
            [sys.executable, "-c", _NOTE_PROMPTS, str(tmp_path / "prompts")],
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            env={**os.environ, "LC_ALL": locale, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
            timeout=60,
            check=True,
        )
    finally:
        os.close(keyboard)
        os.close(terminal)
    noted = (tmp_path / "prompts").read_text().splitlines()
    assert noted == [f"{turn} {line!r}" for turn, line in enumerate(lines)]


@pytest.mark.parametrize("last", ["1a", "1b", "1c"])
def test_a_run_that_has_not_reached_2a_cannot_generate(
    finished: Path, last: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    later = STAGE_ORDER[STAGE_ORDER.index(last) + 1 :]
    shutil.copytree(finished, tmp_path / "run", ignore=shutil.ignore_patterns(*later))
    assert main(["--load", str(tmp_path / "run"), "--prompt", "a"]) == 2
    output, run = capsys.readouterr(), tmp_path / "run"
    said = f"error: after stage {last} the decoder is untrained and cannot generate; complete in {run}: 1a"
    assert said in output.err and "; train on first" in output.err and not output.out


def test_a_stage_without_a_decoder_is_refused_with_those_that_have_one(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--load", str(finished / "1b"), "--prompt", "a"]) == 2
    assert f"complete in {finished}: 1a, 1b, 1c, 2a, 2b; take {finished / '2b'}" in capsys.readouterr().err


def test_a_folder_that_is_no_student_or_a_damaged_one_is_refused(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((exported / name).read_bytes())
    fields = json.loads((exported / "config.json").read_text())
    backbone = fields["backbone"]
    for changed, message in (
        ({**fields, "model_type": "llama"}, "of type 'llama', not an exported student"),
        ({**fields, "backbone": {**backbone, "num_layers": 3}}, "the weights do not fit config.json"),
        ({**fields, "backbone": {**backbone, "wings": 2}}, "unknown field wings"),
        ({**fields, "backbone": {**backbone, "max_position_embeddings": 5}}, "the backbone has 5 positions"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(changed))
        assert main(["--load", str(tmp_path), "--prompt", "a prompt of some length" * 4]) == 2
        assert message in capsys.readouterr().err
    assert main(["--load", str(exported), "--stage", "2a", "--prompt", "a"]) == 2
    assert "--stage: " in (error := capsys.readouterr().err) and "is an export, which holds the weights of" in error


@pytest.mark.parametrize("more", [["--speculate", "4"], ["--speculate", "auto"], ["--kernels", "reference"]])
def test_drafts_and_kernels_change_no_text(
    exported: Path, capsysbinary: pytest.CaptureFixture[bytes], more: list[str]
) -> None:
    command = ["--load", str(exported), "--prompt", "the", "--prompt", "a hill", "--max-new-bytes", "30"]
    assert main(command) == 0
    plain = capsysbinary.readouterr().out
    assert main([*command, *more, "--batch-size", "1"]) == 0
    assert capsysbinary.readouterr().out == plain
    assert main([*command, *more, "--stream"]) == 0
    assert capsysbinary.readouterr().out == plain


@dataclass
class Written:
    """A continuation of one prompt that is known beforehand."""

    prompts: list[bytes]
    text: bytes
    told: Callable[[int], object] = bool
    """Of each byte, when it is written."""

    def __iter__(self) -> Iterator[NewBytes]:
        for byte in self.text:
            self.told(byte)
            yield NewBytes(rows=[0], byte_ids=[byte], bits=[False], log_probabilities=[0.0])

    @property
    def prompt_bits(self) -> list[tuple[bool, ...]]:
        return [row.prompt_bits for row in self.results()]

    def results(self) -> list[Generated]:
        # chunks of five new bytes
        bits = tuple(place % 5 == 4 for place in range(len(self.text))), (True,) * len(self.prompts[0])
        return [Generated(byte_ids=self.text, bits=bits[0], prompt_bits=bits[1], log_probability=0.0, ended=True)]


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
        self.flush()
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
    def begin(prompts: object, settings: object) -> Written:
        return Written([prompt], new)

    screen = Screen(begin, GenerationSettings(), with_boundaries=False)  # type: ignore[arg-type]
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
    written = Written([prompt], new, told=lambda _: seen.append("".join(shown.shown)))
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
    screen = Screen(lambda prompts, _: Written(list(prompts), b"x" * 20), GenerationSettings(), with_boundaries=False)
    screen.stream(b"ab", 0)
    screen.show([b"c"], 1, 2)
    screen.report()
    # three chunks of a byte in the prompts, and four in each of the texts
    assert "40 bytes in 4.0 s (10 bytes/s), 3.91 bytes per chunk, prompts included" in capsys.readouterr().err
    screen.report()
    assert "0 bytes in 0.0 s (0 bytes/s), new bytes" in capsys.readouterr().err
