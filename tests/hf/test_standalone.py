"""An exported folder needs nothing but torch and transformers, of either way to name a cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megabyte_distill.hf.tokenization_megabyte import BOS_MARKER
from megabyte_distill.inference.generation import GenerationSettings, generate
from megabyte_distill.inference.sampling import Sampling
from tests.hf.exported import PATHS, Exported, native_greedy, native_log_probabilities

TEXTS = ["The quick", "né 猫!", "a", ""]
OTHER_VERSION = "MEGABYTE_TEST_TRANSFORMERS"
"""Environment variable: a folder with another version of transformers (pip install --no-deps --target FOLDER)."""
pytestmark = pytest.mark.usefixtures("world")


@pytest.mark.parametrize("which", ["installed", "other"])
def test_without_this_project_it_does_what_the_student_does(exported: Exported, tmp_path: Path, which: str) -> None:
    front = []
    if which == "other":
        if OTHER_VERSION not in os.environ:
            pytest.skip(f"{OTHER_VERSION} names no folder with another version of transformers")
        front = [os.environ[OTHER_VERSION]]
    result = run_alone(exported.folder, tmp_path, front)
    import transformers

    assert (result["version"] == transformers.__version__) is (which == "installed")
    assert result["imported"] == [] and result["files"] == sorted(p.name for p in exported.folder.glob("*.py"))
    texts = [text.encode() for text in TEXTS]
    for row, mask, text in zip(result["log_probabilities"], result["mask"], texts, strict=True):
        got = torch.tensor(row, dtype=torch.float64)[torch.tensor(mask) == 1]
        torch.testing.assert_close(got, native_log_probabilities(exported.student, text), rtol=5e-6, atol=1e-5)
    wanted = [native_greedy(exported.student, text, 8) for text in texts]
    assert result["generated"] == result["uncached"] == result["again"] == wanted
    assert result["columns_of_calls"][1:] == [1] * 7, "each call reads one new byte"
    assert result["beams"][0] == result["beams"][1]
    greedy = GenerationSettings(max_new_bytes=8, sampling=Sampling(temperature=0.0), paths=PATHS)
    assert result["joint"] == [list(row.byte_ids) for row in generate(exported.student, texts, greedy)]
    assert result["decoded"] == TEXTS and result["marker"] == BOS_MARKER and result["padding"] == "left"


def run_alone(folder: Path, scratch: Path, front: list[str]) -> dict[str, Any]:
    """tests/hf/standalone.py in a process of its own, away from the repository."""
    program = Path(__file__).with_name("standalone.py")
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "LANG", "TMPDIR")}
    variables = {
        **kept, "PYTHONPATH": os.pathsep.join(front), "HF_MODULES_CACHE": str(scratch / "modules"),
        "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(program), str(folder), str(scratch), *TEXTS],
        capture_output=True, text=True, timeout=300, env=variables, cwd=scratch, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result
