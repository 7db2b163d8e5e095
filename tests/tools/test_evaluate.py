"""tools/evaluate.py: its figures, and one line and exit code 2 for every mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megabyte_distill.parallel.process_groups import world
from tests.pretrain.job import Job, write_data, write_tokenizer
from tools.evaluate import main


def test_all_figures_as_json_and_as_a_table(job: Job, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--load", str(finished), "--data-path", job.held_out, "--seq-length", "256", "--path-bytes", "100"]
    with world():
        assert main([*command, "--json", "--train-data-path", job.train, "--paths", "2"]) == 0
        figures = json.loads(capsys.readouterr().out)
        assert main([*command, "--paths", "0", "--max-bytes", "300"]) == 0
    assert figures["documents"] == 3 and figures["paths"]["paths"] == 2
    assert figures["retention"] == pytest.approx(figures["teacher_bits_per_byte"] / figures["student_bits_per_byte"])
    assert figures["unigram_bits_per_byte"] < figures["student_bits_per_byte"]
    table = capsys.readouterr().out
    assert "retention" in table and "paths" not in table and "unigram" not in table


def test_mistakes_are_one_error_line(
    job: Job, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["--load", str(finished)]
    other = write_tokenizer(tmp_path / "hf", ["quite", "other", "words"], 280)
    foreign = write_data(tmp_path / "foreign", other, seed=0, documents=1)
    with world():
        for command, message in (
            ([*run, "--data-path", str(tmp_path / "no_text_document")], "no_text_document"),
            ([*run, "--data-path", foreign], "made with another tokenizer"),
            ([*run, "--data-path", job.held_out, "--max-bytes", "0"], "max_bytes is 0"),
            ([*run, "--data-path", job.held_out, "--seq-length", "1"], "--seq-length 1"),
            ([*run, "--data-path", job.held_out, "--teacher", str(tmp_path / "none")], "give --teacher"),
            ([*run, "--data-path", job.held_out, "--stage", "1b"], "the decoder is untrained"),
            (["--load", str(tmp_path), "--data-path", job.held_out], "is not a run"),
        ):
            assert main(command) == 2
            error = capsys.readouterr().err.strip()
            assert error.startswith("error: ") and message in error and "\n" not in error
