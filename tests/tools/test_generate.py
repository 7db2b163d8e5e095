"""tools/generate.py: what it prints, and one line and exit code 2 for every mistake."""

from __future__ import annotations

from pathlib import Path

import pytest

from megabyte_distill.inference.generation import GenerationSettings, generate
from megabyte_distill.inference.sampling import Sampling
from megabyte_distill.parallel.process_groups import world
from megabyte_distill.runs import load_student
from tests.pretrain.job import Job
from tools.generate import main, mark_chunks


def test_a_seed_gives_the_text_of_the_api_from_a_prompt_and_from_a_file(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompt").write_bytes(b"the old")
    command = ["--load", str(finished), "--max-new-bytes", "20", "--temperature", "0.5"]
    seen = set()
    with world():
        student = load_student(finished).student
        for seed in range(7, 12):
            settings = GenerationSettings(max_new_bytes=20, sampling=Sampling(temperature=0.5), seed=seed)
            # an untrained model's bytes are often no UTF-8, or none at all: they are counted, whatever is shown
            wanted = generate(student, ["the old"], settings)[0].byte_ids
            for prompt in (["--prompt", "the old"], ["--prompt-file", str(tmp_path / "prompt")]):
                assert main([*command, *prompt, "--seed", str(seed)]) == 0
                output = capsys.readouterr()
                assert output.out == "the old" + wanted.decode("utf-8", errors="replace") + "\n"
                assert f"{len(wanted)} bytes in " in output.err and "bytes/s" in output.err
            seen.add(wanted)
    assert len(seen) > 1


def test_boundaries_are_shown(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with world():
        assert main(["--load", str(finished), "--prompt", "the", "--max-new-bytes", "30", "--show-boundaries"]) == 0
    output = capsys.readouterr()
    assert output.out.replace("|", "").startswith("the") and "bytes per chunk" in output.err


def test_chunks_are_marked_by_bars_or_colours() -> None:
    assert mark_chunks(b"the cat", [False, False, True, False, False, False, True], colour=False) == "the| cat|"
    assert mark_chunks(b"the c", [False, False, True, False, False], colour=False) == "the| c"
    assert mark_chunks(b"", [], colour=False) == ""
    coloured = mark_chunks("é!".encode(), [False, True, True], colour=True)
    assert "é" in coloured and coloured.count("\x1b[0m") == 2


def test_mistakes_are_one_error_line(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad").write_bytes(b"abc\xfe")
    run = ["--load", str(finished)]
    with world():
        for command, message in (
            ([*run, "--prompt-file", str(tmp_path / "bad")], "byte 254 (0xFE) at offset 3"),
            ([*run, "--prompt-file", str(tmp_path / "missing")], "missing"),
            ([*run, "--prompt", "ab\udcff"], "byte 255 (0xFF) at offset 2"),
            ([*run, "--prompt", "a", "--temperature", "-1"], "temperature is -1.0"),
            ([*run, "--prompt", "a", "--top-p", "0"], "top_p is 0.0"),
            ([*run, "--prompt", "a", "--top-k", "-2"], "top_k is -2"),
            ([*run, "--prompt", "a", "--paths", "0"], "paths is 0"),
            ([*run, "--prompt", "a", "--max-new-bytes", "-1"], "max_new_bytes is -1"),
            ([*run, "--prompt", "a", "--stage", "1c"], "the decoder is untrained"),
            (["--load", str(tmp_path), "--prompt", "a"], "is not a run"),
        ):
            assert main(command) == 2
            error = capsys.readouterr().err.strip()
            assert error.startswith("error: ") and message in error and "\n" not in error


def test_a_run_that_has_not_reached_2a_cannot_generate(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert job.run(tmp_path / "run", "--stages", "1a") == 0
    capsys.readouterr()
    assert main(["--load", str(tmp_path / "run"), "--prompt", "a"]) == 2
    assert "after stage 1a the decoder is untrained and cannot generate" in capsys.readouterr().err
