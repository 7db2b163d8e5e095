"""python -m megabyte_distill.memory: training's flags, short sizes, a table or JSON, and clear errors."""

from __future__ import annotations

import json
import re

import pytest

from megabyte_distill.memory.__main__ import main
from tests.pretrain.job import ROOT, run_command

PIPELINE = ["--preset", "olmo2-1b", "--pp", "2", "--dp", "2", "--stage", "1b", "--seq-length", "1024"]


def test_the_table_is_the_json_rounded(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*PIPELINE, "--json"]) == 0
    first, last = json.loads(capsys.readouterr().out)
    assert main(PIPELINE) == 0
    text = capsys.readouterr().out
    assert "4 ranks = tensor 1 × pipeline 2 × data 2" in text
    for place, memory in enumerate((first, last)):
        (line,) = [line for line in text.splitlines() if re.match(rf" *1b +{place} ", line)]
        assert line.endswith(f"{memory['total'] / 2**30:.2f}")
        parts = ("weights", "teacher", "gradients", "optimizer", "activations")
        assert memory["total"] == sum(memory[name] for name in parts)
    assert f"largest: {max(first['total'], last['total']) / 2**30:.2f} GiB" in text


def test_sequence_parallelism_and_the_distributed_optimizer_save_what_they_should(
    capsys: pytest.CaptureFixture[str],
) -> None:
    small = ["--preset", "olmo2-1b", "--stage", "2b", "--seq-length", "1024", "--tp", "2", "--json"]
    found = {}
    for flag in ("", "--sequence-parallel", "--use-distributed-optimizer"):
        assert main([*small, "--dp", "4", *flag.split()]) == 0
        (found[flag],) = json.loads(capsys.readouterr().out)
    assert found["--sequence-parallel"]["activations"] < found[""]["activations"]
    assert found["--sequence-parallel"]["optimizer"] == found[""]["optimizer"]
    quarter = found[""]["optimizer"] / 4
    assert found["--use-distributed-optimizer"]["optimizer"] == pytest.approx(quarter, rel=1e-3)


def test_any_hugging_face_config_will_do(capsys: pytest.CaptureFixture[str]) -> None:
    teacher = ROOT / "examples" / "tiny" / "teacher"
    assert main(["--preset", "tiny", "--hf-model", str(teacher), "--stage", "1a"]) == 0
    assert "0.0052 B" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--tp 3", "attention heads 16 is not divisible by --tp 3"),
        ("--tp 0", "--tp: got 0, expected a whole number of at least 1"),
        ("--tensor-model-parallel-size 0", "--tensor-model-parallel-size: got 0, expected at least 1"),
        ("--tp 2 --tensor-model-parallel-size 2", "--tp: is short for --tensor-model-parallel-size, which is given as"),
        ("--pp 2 --pipeline-model-parallel-size=1", "--pp: is short for --pipeline-model-parallel-size"),
        ("--preset tiny", "--preset tiny is no published model"),
        ("--stage 9z", "unknown stage '9z'"),
        ("--bytes-per-chunk 0.5", "--bytes-per-chunk: got 0.5, expected a number of at least 1"),
        ("--num-experts 8", "--num-experts is Megatron's, and not taken here"),
        ("--hf-model nowhere", "nowhere"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(line: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--preset", "olmo2-1b", "--stage", "1a", *line.split()]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ") and expected in error, error


def test_all_mistakes_are_told_together(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--dp", "x", "--lr", "fast", "--stage", "1a", "--stages", "1b", "--frob"]) == 2
    output = capsys.readouterr()
    told = [line.removeprefix("error: ").split(":")[0].split(";")[0] for line in output.err.splitlines()]
    assert told == ["--dp", "--stage", "--lr", "unknown flag --frob"] and not output.out


def test_trainings_names_of_the_sizes_count_as_the_short_ones(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"--tp": "--tensor-model-parallel-size", "--pp": "--pipeline-model-parallel-size", "--stage": "--stages"}
    line = ["--preset", "olmo2-1b", "--tp", "2", "--pp", "2", "--dp", "2", "--stage", "1a", "--seq-length", "256"]
    shown = set()
    for words in (line, [sizes.get(word, word) for word in line]):
        assert main(words) == 0
        shown.add(capsys.readouterr().out)
    (text,) = shown
    assert "8 ranks = tensor 2 × pipeline 2 × data 2" in text


def test_a_warning_leaves_the_json_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--preset", "olmo2-1b", "--stage", "1a", "--seq-length", "256", "--2a.lr", "1", "--json"]) == 0
    output = capsys.readouterr()
    assert json.loads(output.out) and output.err.startswith("warning: --2a.lr has no effect")


def test_the_page_on_scaling_shows_what_it_prints(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--use-distributed-optimizer", "--overlap-grad-reduce", "--recompute-byte-mixers", "--json"]
    assert main(["--preset", "olmo2-1b", "--dp", "8", "--stage", "1b,2b", *flags]) == 0
    totals = [f"{memory['total'] / 2**30:.1f}" for memory in json.loads(capsys.readouterr().out)]
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    (row,) = [line for line in page.splitlines() if line.startswith("| OLMo-2-1B | 8 | 1 | 1 |")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert [cells[5], cells[8]] == totals, "print the table of docs/scaling.md anew"


def test_it_is_a_program() -> None:
    done = run_command(["python", "-m", "megabyte_distill.memory", "--help"])
    assert done.returncode == 0 and "--preset is llama3.2-3b" in done.stdout
