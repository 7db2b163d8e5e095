from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from megabyte_distill.data.dataset import ByteTokenDataset
from tools.preprocess_bytes import main

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tokenizer of single bytes."""
    vocabulary = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["<|endoftext|>"])
    path = tmp_path / "teacher"
    path.mkdir()
    tokenizer.save(str(path / "tokenizer.json"))
    return path


def _command(*arguments: object) -> list[str]:
    return [sys.executable, str(ROOT / "tools" / "preprocess_bytes.py"), *map(str, arguments)]


def _run(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(_command(*arguments), capture_output=True, text=True, env=environment, timeout=100)


def test_the_documented_command_writes_a_set(tmp_path: Path, folder: Path) -> None:
    source = tmp_path / "corpus.jsonl"
    source.write_text("".join(json.dumps({"text": f"document {index}"}) + "\n" for index in range(3000)))
    done = _run(
        *("--input", source, "--output-prefix", tmp_path / "data" / "corpus", "--tokenizer-model", folder),
        *("--workers", 2, "--log-interval", 1000),
    )
    assert done.returncode == 0, done.stderr
    stem = str(tmp_path / "data" / "corpus_text_document")
    assert f"--data-path {stem}" in done.stdout and "documents 3000" in done.stdout
    assert "tokenizer: " in done.stderr and "Processed 3000 documents (" in done.stderr
    assert ByteTokenDataset(stem)[2999].byte_ids.tobytes() == b"document 2999"


def test_bad_input_is_one_clear_line(tmp_path: Path, folder: Path) -> None:
    source = tmp_path / "corpus.jsonl"
    source.write_text('{"text": "a"}\n{"text": 5}\n')
    done = _run("--input", source, "--output-prefix", tmp_path / "o", "--tokenizer-model", folder)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[1:] == [f"error: {source}, line 2: 'text' is int, expected text"]
    missing = _run("--input", source, "--output-prefix", tmp_path / "o", "--tokenizer-model", tmp_path / "nowhere")
    assert missing.returncode == 2 and missing.stderr.startswith(f"error: {tmp_path / 'nowhere'}: no such tokenizer")
    assert not list(tmp_path.glob("o_*"))


def test_a_killed_run_leaves_nothing_that_looks_complete(tmp_path: Path, folder: Path) -> None:
    source = tmp_path / "corpus.jsonl"
    source.write_text(json.dumps({"text": "some words and more " * 50}) + "\n")
    source.write_bytes(source.read_bytes() * 60_000)
    arguments = ("--input", source, "--output-prefix", tmp_path / "o", "--tokenizer-model", folder)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(_command(*arguments), env=environment, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert process.stderr.readline().startswith("tokenizer: ")
    assert process.stderr.readline().startswith("Processed ")
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=30)
    process.stderr.close()
    assert list(tmp_path.glob("o_*.partial"))
    assert not [path for path in tmp_path.glob("o_*") if path.suffix != ".partial"]
    with pytest.raises(ValueError, match="no such file"):
        ByteTokenDataset(str(tmp_path / "o_text_document"))
    source.write_text('{"text": "again"}\n')
    started = time.monotonic()
    assert _run(*arguments).returncode == 0 and time.monotonic() - started < 60
    assert not list(tmp_path.glob("o_*.partial"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_workers_end_with_the_run_and_a_request_to_stop_cleans_up(
    tmp_path: Path, folder: Path, number: signal.Signals, code: int
) -> None:
    source = tmp_path / "corpus.jsonl"
    source.write_bytes(json.dumps({"text": "some words and more " * 50}).encode() + b"\n")
    source.write_bytes(source.read_bytes() * 60_000)
    flags = ("--input", source, "--output-prefix", tmp_path / "o", "--tokenizer-model", folder, "--workers", 2)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(_command(*flags), env=environment, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    process.stderr.readline()
    assert process.stderr.readline().startswith("Processed ")
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 2
    process.send_signal(number)
    with process.stderr:
        said = process.stderr.read()
    assert process.wait(timeout=30) == code and "Traceback" not in said
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive
    left = {path.suffix for path in tmp_path.glob("o*")}
    assert left == ({".partial", ".lock"} if number == signal.SIGKILL else set())


def test_verify_and_inspect_take_the_prefix(tmp_path: Path, folder: Path) -> None:
    source, prefix = tmp_path / "corpus.jsonl", tmp_path / "o"
    source.write_text('{"text": "ab"}\n{"text": "é"}\n')
    assert _run("--input", source, "--output-prefix", prefix, "--tokenizer-model", folder).returncode == 0
    done = _run("verify", prefix)
    assert done.returncode == 0 and done.stdout.strip().endswith("2 documents, 4 bytes, 4 tokens: correct")
    shown = _run("inspect", prefix, "--document", 1)
    assert shown.returncode == 0 and shown.stdout.splitlines()[1] == "⟨c3⟩│⟨a9⟩│"
    tokens = tmp_path / "o_text_tokens.bin"
    tokens.write_bytes(tokens.read_bytes()[::-1])
    damaged = _run("verify", prefix)
    assert damaged.returncode == 2 and "document 0" in damaged.stderr and "Traceback" not in damaged.stderr


def test_partitions_are_merged_by_the_tool(tmp_path: Path, folder: Path) -> None:
    for index in range(2):
        (tmp_path / f"{index}.txt").write_text(f"document {index}")
    flags = ("--input", tmp_path / "*.txt", "--output-prefix", tmp_path / "o", "--tokenizer-model", folder)
    for index in range(2):
        assert _run(*flags, "--partitions", 2, "--partition-index", index).returncode == 0
    done = _run("merge", "--output-prefix", tmp_path / "o")
    stem = str(tmp_path / "o_text_document")
    assert done.returncode == 0 and done.stdout.strip() == f"--data-path {stem}"
    assert ByteTokenDataset(stem)[1].byte_ids.tobytes() == b"document 1"


def test_dialogues_are_written_by_a_template_in_workers(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}{{ m.role[0] }}>{{ m.content }}\n{% endfor %}"
                        "{% if add_generation_prompt %}a>{% endif %}")  # fmt: skip
    turns = [{"role": "user", "content": "日"}, {"role": "assistant", "content": "本\0"}]
    for number in range(2):
        (tmp_path / f"{number}.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    prefix, inputs = tmp_path / "chat", [str(tmp_path / f"{number}.jsonl") for number in range(2)]
    words = ["--input", *inputs, "--output-prefix", str(prefix), "--tokenizer-model", str(folder)]
    assert main([*words, "--chat-template", str(template), "--workers", "2", "--partitions", "2"]) == 0
    out = capsys.readouterr().out
    assert "answers to train on: 12 bytes and ends of documents (42.9 %)" in out
    assert f"--data-path {prefix}_messages_document" in out
    assert main(["verify", str(prefix)]) == 0 and main(["inspect", str(prefix), "--document", "1"]) == 0
    assert "trained bytes (from – to, exclusive; 13 is the document's end): 8–14" in capsys.readouterr().out
    assert main([*words, "--chat-template", str(tmp_path / "none"), "--overwrite"]) == 2
    assert "expected chatml, teacher, or a file with a Jinja template" in capsys.readouterr().err
