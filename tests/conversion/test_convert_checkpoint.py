"""tools/convert_checkpoint.py: its commands, and one line and exit code 2 for every mistake."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.pretrain.job import environment
from tools.convert_checkpoint import main

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.usefixtures("world")


@pytest.mark.usefixtures("every_line")
def test_all_commands_one_after_the_other(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint, exported = str(tmp_path / "ckpt"), tmp_path / "hf"
    assert main(["import", "--hf-model", str(llama), "--megatron-path", checkpoint]) == 0
    assert "import: 100 %" in capsys.readouterr().err
    assert (
        main(["compare", "--hf-model", str(llama), "--megatron-path", checkpoint, "--json", "--text", "the dog"]) == 0
    )
    result = json.loads(capsys.readouterr().out)
    assert result["max_abs_logit_difference"] < 1e-5 and result["tokens"] > 1
    assert main(["export", "--teacher", "--megatron-path", checkpoint, "--hf-path", str(exported)]) == 0
    assert (exported / "model.safetensors").read_bytes()
    half = [*("export", "--teacher", "--megatron-path", checkpoint), "--hf-path", str(tmp_path / "half")]
    assert main([*half, "--torch-dtype", "float16"]) == 0
    assert {t.dtype for t in load_file(tmp_path / "half" / "model.safetensors").values()} == {torch.float16}
    assert main(["roundtrip", "--hf-model", str(exported)]) == 0
    output = capsys.readouterr()
    assert "39 tensors are bit-identical" in output.out and "%" not in output.out
    assert output.err.count("import: 100 %") == 1 and output.err.count("export: 100 %") == 3


def test_an_existing_output_needs_overwrite(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["import", "--hf-model", str(llama), "--megatron-path", str(tmp_path / "ckpt")]
    assert main(command) == 0
    assert main(command) == 2
    assert "give --overwrite" in capsys.readouterr().err
    assert main(["import", "--hf-model", str(tmp_path / "no"), *command[3:]]) == 2
    error = capsys.readouterr().err  # told before the model is touched, with the other mistakes
    assert "--hf-model: " in error and "--megatron-path: " in error and "give --overwrite" in error
    assert main([*command, "--overwrite", "--torch-dtype", "bfloat16"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt"]


def test_mistakes_are_one_error_line(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    for command, message in (
        (["import", "--hf-model", str(tmp_path / "no"), "--megatron-path", str(tmp_path / "c")], "does not exist"),
        (["import", "--hf-model", str(tmp_path / "file"), "--megatron-path", str(tmp_path / "c")], "not a directory"),
        (["import", "--hf-model", str(tmp_path), "--megatron-path", str(tmp_path / "c")], "has no config.json"),
        (["import", "--hf-model", str(llama), "--megatron-path", str(tmp_path / "file")], "exists and is not a dir"),
        (["export", "--teacher", "--megatron-path", str(llama), "--hf-path", str(tmp_path / "c")], "model_config.json"),
        (["compare", "--hf-model", str(llama), "--megatron-path", str(llama)], "model_config.json"),
        (["roundtrip", "--hf-model", str(tmp_path)], "has no config.json"),
    ):
        assert main(command) == 2
        error = capsys.readouterr().err.strip()
        assert error.startswith("error: ") and message in error and "\n" not in error
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["roundtrip", "--hf-model", "x"]) == 2
    assert "not torchrun" in capsys.readouterr().err


def test_as_a_program_it_exits_2_without_a_traceback(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / "convert_checkpoint.py"), "roundtrip", "--hf-model", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)}, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr and not done.stdout


def test_compare_prints_a_line_per_position(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = str(tmp_path / "ckpt")
    assert main(["import", "--hf-model", str(llama), "--megatron-path", checkpoint]) == 0
    (tmp_path / "text.txt").write_text("the old dog", encoding="utf-8")
    command = ["compare", "--hf-model", str(llama), "--megatron-path", checkpoint]
    capsys.readouterr()
    assert main([*command, "--text-file", str(tmp_path / "text.txt"), "--per-position"]) == 0
    *lines, summary = capsys.readouterr().out.splitlines()
    assert lines[0].split()[0] == "0" and lines[0].endswith("'<start>'") and lines[-1].endswith("g'")
    assert f"over {len(lines)} positions, at position" in summary
    assert main([*command, "--text", "the old dog", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert len(result["per_position"]) == len(lines) == result["tokens"]
    largest = result["per_position"][result["largest_at"]]["max_abs_logit_difference"]
    assert largest == result["max_abs_logit_difference"]
    assert main([*command, "--text-file", str(tmp_path / "absent.txt")]) == 2
    assert "absent.txt" in capsys.readouterr().err


def test_sizes_that_do_not_fit_are_refused_before_anything_is_written(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["import", "--hf-model", str(llama), "--megatron-path", str(tmp_path / "ckpt")]
    assert main([*command, "--tp", "5", "--pp", "3"]) == 2
    error = capsys.readouterr().err
    assert "attention heads 6 is not divisible by --tp 5" in error and "layers 4 is not divisible by --pp 3" in error
    assert list(tmp_path.iterdir()) == []
    assert main([*command, "--tp", "2", "--pp", "4"]) == 0


@pytest.mark.parametrize("command", ["import", "export"])
def test_a_full_disk_leaves_nothing(llama: Path, tmp_path: Path, command: str) -> None:
    source, target = tmp_path / "ckpt", tmp_path / "made" / "out"
    target.parent.mkdir()
    flags = ["--hf-model", str(llama), "--megatron-path", str(target)]
    if command == "export":
        assert main(["import", "--hf-model", str(llama), "--megatron-path", str(source)]) == 0
        flags = ["--teacher", "--megatron-path", str(source), "--hf-path", str(target)]
    tool = ROOT / "tools" / "convert_checkpoint.py"
    limited = f'ulimit -f 30; exec {sys.executable} {tool} {command} "$@"'  # in KiB: less than the largest file
    done = subprocess.run(
        ["bash", "-c", limited, "bash", *flags], capture_output=True, text=True, env=environment(), timeout=240
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr, done.stderr
    assert "File too large" in done.stderr and "out.incomplete" in done.stderr, done.stderr
    assert list(target.parent.iterdir()) == []
