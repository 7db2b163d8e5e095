"""The README's five commands do what they say, typed as they stand, on a tiny teacher."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from megabyte_distill.conversion.hf_export import export_teacher
from megabyte_distill.parallel.process_groups import world
from tests.pretrain.conftest import job
from tests.pretrain.job import WORDS, Job, environment

__all__ = ["job"]
ROOT = Path(__file__).resolve().parent.parent
SMALL = (
    "--train-iters 2 --seq-length 256 --global-batch-size 2 --micro-batch-size 1 --chunk-bucket 32 --byte-width 32 "
    "--encoder-layers 1 --decoder-layers 1 --encoder-ffn-hidden-size 48 --decoder-ffn-hidden-size 48 --eval-iters 1 "
    "--router-hidden-size 48 --conv-ffn-hidden-size 48 --summary-bytes 500"
)
"""What keeps the README's training command within seconds."""


def readme_commands() -> list[str]:
    """The lines of the code block that shows a user's own model and text."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## Your own model and text")[1]
    block = re.search(r"```bash\n(.*?)```", section, re.DOTALL)
    assert block is not None
    return [line for line in block[1].splitlines() if line.strip()]


def in_a_shell(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    line = command.replace("tools/", f"{ROOT}/tools/").replace("examples/", f"{ROOT}/examples/")
    return subprocess.run(
        shlex.split(line),
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        errors="replace",
        timeout=240,
        check=False,
    )


@pytest.fixture
def place(job: Job, tmp_path: Path) -> Path:
    """A folder with DIR (a Hugging Face teacher) and corpus.jsonl."""
    export_here = tmp_path / "DIR"
    with world():
        export_teacher(job.teacher, export_here)
    lines = [json.dumps({"text": " ".join(WORDS[i % 5 :] * 8)}) for i in range(12)]
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "data").mkdir()
    return tmp_path


@pytest.mark.timeout(900)
def test_five_commands_take_a_teacher_and_a_text_to_a_byte_model(place: Path) -> None:
    commands = readme_commands()
    assert len(commands) == 5
    for command in commands:
        line = f"{command} {SMALL}" if command.startswith("torchrun") else command
        line = f"{line} --max-new-bytes 20" if "generate.py" in line else line
        done = in_a_shell(line, place)
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        if "--json" in line:
            figures = json.loads(done.stdout)
            assert figures["teacher_bits_per_byte"] > 0 and figures["student_bits_per_byte"] > 0
