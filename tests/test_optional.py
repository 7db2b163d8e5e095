"""Optional packages that are broken, or are not what their name says, do not stop a start."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megabyte_distill import optional

BROKEN = "raise RuntimeError('libcudnn.so shared object not found.\\nsecond line')\n"
WEB_TOOLKIT = "print 'a toolkit for Pyramid'\n"  # Python 2, as the package on the index is
EMPTY = ""
STARTS = """
import sys
from megabyte_distill import optional
assert "megatron" not in sys.modules and "torch" not in sys.modules, "importing the package imports nothing heavy"
import megatron.core.optimizer, megatron.core.models.gpt.gpt_layer_specs
"""
HIDES = "from megabyte_distill import optional; optional.hide_unusable()\n"
TELLS = """
import importlib.util, sys
for name in ("transformer_engine", "apex"):
    print(name, "|", optional.problem(name), "|", importlib.util.find_spec(name) is not None)
print("describe", optional.describe())
print("loaded", [m for m in sys.modules if m.startswith(("transformer_engine", "apex"))])
"""


def package(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def start(folder: Path, code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(folder), str(Path(__file__).resolve().parents[1])])
    given = {**os.environ, "PYTHONPATH": path, **environment}
    return subprocess.run([sys.executable, "-c", code], env=given, capture_output=True, text=True, timeout=200)


def told(done: subprocess.CompletedProcess[str], name: str) -> list[str]:
    return [line for line in done.stderr.splitlines() if f"RuntimeWarning: {name}" in line]


BAD = {
    # what was loaded before the failure must go as well
    "transformer_engine/__init__.py": f"from transformer_engine import common\n{BROKEN}",
    "transformer_engine/common.py": EMPTY,
    "apex/__init__.py": WEB_TOOLKIT,
    "apex/views.py": EMPTY,
}


@pytest.mark.parametrize("name", ["transformer_engine", "apex"])
def test_megatron_alone_does_not_survive_it(tmp_path: Path, name: str) -> None:
    folder = package(tmp_path, {file: text for file, text in BAD.items() if file.startswith(name)})
    done = start(folder, "import megatron.core.optimizer")
    assert done.returncode != 0 and ("libcudnn" if name == "transformer_engine" else "SyntaxError") in done.stderr


def test_a_start_leaves_out_what_is_broken_and_says_why(tmp_path: Path) -> None:
    done = start(package(tmp_path, BAD), STARTS + TELLS)
    assert done.returncode == 0, done.stderr
    why = {
        "transformer_engine": "cannot be loaded (RuntimeError: libcudnn.so shared object not found.)",
        "apex": "is another package of that name (a web toolkit), not NVIDIA's",
    }
    for name, reason in why.items():
        assert f"{name} | {reason} | False" in done.stdout
        assert len(told(done, name)) == 1 and f"{name} {reason}; it is left out" in done.stderr
    assert "'transformer_engine': 'not usable: cannot be loaded (RuntimeError" in done.stdout
    # None stands for "there is none"
    assert "loaded ['transformer_engine', 'apex']" in done.stdout


def test_ranks_behind_the_first_are_silent(tmp_path: Path) -> None:
    done = start(package(tmp_path, BAD), HIDES + TELLS, RANK="1")
    assert done.returncode == 0 and not told(done, "transformer_engine") and not told(done, "apex")


def test_packages_without_the_parts_that_megatron_takes_are_left_out(tmp_path: Path) -> None:
    files = {
        "transformer_engine/__init__.py": "__version__ = '2.19.0'\n",
        "apex/__init__.py": EMPTY,
        "apex/optimizers/__init__.py": EMPTY,
        "apex/optimizers/fused_adam.py": EMPTY,
    }
    done = start(package(tmp_path, files), HIDES + TELLS)
    assert done.returncode == 0, done.stderr
    missing = "cannot be loaded (ModuleNotFoundError: No module named "
    assert f"transformer_engine | {missing}'transformer_engine.pytorch') | False" in done.stdout
    assert f"apex | {missing}'amp_C') | False" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_gpu_packages_are_left_out_where_there_is_no_gpu(tmp_path: Path) -> None:
    files = {
        "transformer_engine/__init__.py": "__version__ = '2.19.0'\n",
        "transformer_engine/pytorch/__init__.py": EMPTY,
        "apex/__init__.py": EMPTY,
        "apex/optimizers/__init__.py": EMPTY,
        "apex/optimizers/fused_adam.py": EMPTY,
        "amp_C.py": EMPTY,
    }
    done = start(package(tmp_path, files), HIDES + TELLS)
    assert done.returncode == 0, done.stderr
    for name in ("transformer_engine", "apex"):
        assert f"{name} | runs on GPUs alone, and torch sees none | False" in done.stdout
        assert len(told(done, name)) == 1


def test_what_is_not_installed_is_no_news(tmp_path: Path) -> None:
    if optional.problem("transformer_engine") != "is not installed" or optional.problem("apex") != "is not installed":
        pytest.skip("Transformer Engine or apex is installed here")
    done = start(tmp_path, HIDES + TELLS)
    assert done.returncode == 0 and not told(done, "transformer_engine") and not told(done, "apex"), done.stderr
    assert "loaded []" in done.stdout


def test_the_harness_says_what_to_install(tmp_path: Path) -> None:
    hides = "import runpy, sys; sys.modules['lm_eval'] = None\n"
    done = start(tmp_path, f"{hides}runpy.run_module('megabyte_distill.harness', run_name='__main__')")
    message = "error: lm-evaluation-harness is not installed; pip install 'megabyte-distill[eval]'\n"
    assert (done.returncode, done.stderr) == (2, message)
