"""tools/evaluate.py: its figures, and one line and exit code 2 for every mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tqdm import tqdm

from megabyte_distill.parallel.process_groups import world
from tests.pretrain.job import Job, write_data, write_tokenizer
from tools.evaluate import main


@pytest.mark.usefixtures("every_line")
def test_all_figures_as_json_and_as_a_table(job: Job, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--load", str(finished), "--data-path", job.held_out, "--seq-length", "256"]
    along = ["--path-bytes", "100", "--boundary-thresholds", "0.6,0.4", "--boundary-threshold", "0.4"]
    with world():
        assert main([*command, "--json", "--train-data-path", job.train, "--paths", "2", *along]) == 0
        output = capsys.readouterr()
        figures = json.loads(output.out)
        size = tqdm.format_sizeof(figures["text_bytes"])
        assert all(f"{what}: 100 %, {size}B of {size}B" in output.err for what in ("held-out text", "thresholds"))
        assert "2 bit histories: 100 %" in output.err
        assert main([*command, "--paths", "0", "--max-bytes", "300", "--max-documents", "1"]) == 0
    assert figures["documents"] == 3 and figures["paths"]["paths"] == 2
    assert figures["retention"] == pytest.approx(figures["teacher_bits_per_byte"] / figures["student_bits_per_byte"])
    assert [line["threshold"] for line in figures["thresholds"]] == [None, 0.4, 0.6]
    gold, router, _ = figures["thresholds"]
    assert gold["bits_per_byte"] == pytest.approx(figures["gold_bits_per_byte"])
    assert router["bits_per_byte"] == pytest.approx(figures["router_bits_per_byte"])
    assert figures["unigram_bits_per_byte"] < figures["student_bits_per_byte"]
    table = capsys.readouterr().out
    assert "bytes of 1 document;" in table and "retention" in table and "paths" not in table and "unigram" not in table


def test_sets_have_rows_runs_stand_side_by_side_and_pictures_are_drawn(
    job: Job, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = ["--data-path", f"first={job.held_out}", f"second={job.train}", "--max-documents", "2"]
    command = [*sets, "--seq-length", "256", "--paths", "0", "--scoring", "official"]
    other = tmp_path / "other"
    other.symlink_to(finished)
    drawn = ["--plots", str(tmp_path / "plots"), "--json", "--resamples", "50"]
    with world():
        assert main(["--load", str(finished), *command, "--bits", "router", *drawn]) == 0
        output = capsys.readouterr()
        figures = json.loads(output.out)
        assert main(["--load", str(finished), str(other), *command]) == 0
    assert list(figures["sets"]) == ["first", "second"] and figures["documents"] == 4
    assert figures["bits"] == "router" and figures["student_bits_per_byte"] == figures["router_bits_per_byte"]
    exact = figures["teacher_exact_bits_per_byte"]  # ids that cannot be text are left out
    assert 0.5 * figures["teacher_bits_per_byte"] < exact < figures["teacher_bits_per_byte"]
    assert figures["official_bits_per_byte"] > 0 and 0 <= figures["teacher_next_byte_accuracy"] <= 1
    low, high = figures["sets"]["first"]["intervals"]["retention"]
    assert low <= figures["sets"]["first"]["retention"] <= high
    assert figures["bootstrap"] == {"resamples": 50, "confidence": 0.95, "seed": 0}
    assert any("--train-data-path" in note for note in figures["notes"])
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {"sets.png", "boundaries.png"}
    assert f"written: {tmp_path / 'plots/sets.png'}, {tmp_path / 'plots/boundaries.png'}" in output.err
    table = capsys.readouterr().out
    assert table.count("all text") == 2 and "official score" in table
    of_runs = [line.split() for line in table.splitlines()[-2:]]
    assert [line[0] for line in of_runs] == [str(finished), str(other)] and of_runs[0][1:] == of_runs[1][1:]


@pytest.mark.usefixtures("every_line")
def test_the_robustness_suite_of_a_run(
    job: Job, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--suite-texts", "1", "--suite-questions", "1", "--suite-samples", "1", "--resamples", "0"]
    command = ["--load", str(finished), "--data-path", job.held_out, "--suite", "robustness", "--paths", "1", *small]
    with world():
        assert main([*command, "--json", "--plots", str(tmp_path)]) == 0
    output = capsys.readouterr()
    found = json.loads(output.out)
    assert "robustness: 100 %" in output.err
    assert found["suite"] == "robustness" and len(found["sections"]) == 7 and found["budget"]["texts"] == 1
    assert (tmp_path / "robustness.png").exists() and f"written: {tmp_path / 'robustness.png'}" in output.err


def test_mistakes_are_one_error_line(
    job: Job, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["--load", str(finished)]
    other = write_tokenizer(tmp_path / "hf", ["quite", "other", "words"], 280)
    foreign = write_data(tmp_path / "foreign", other, seed=0, documents=1)
    with world():
        for more, message in (
            (["--data-path", foreign], "made with another tokenizer"),
            (["--data-path", job.held_out, "--bits", "merged"], "--bits merged: the student was not trained with"),
        ):
            assert main([*run, *more]) == 2
            error = capsys.readouterr().err.strip()
            assert error.startswith("error: ") and message in error and "\n" not in error
