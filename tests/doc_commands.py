"""The commands of README and docs, as bash and the programs that they call read them.

bash runs a page's blocks with nothing but stand-ins in PATH, which write down how they were called: quotes, continued
lines, variables and the scripts in examples/ are bash's own. Each call is then given to the parser of the program.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from megabyte_distill.config import ConfigError, parse_arguments
from megabyte_distill.tool import ToolParser

ROOT = Path(__file__).resolve().parent.parent
ELSEWHERE = {
    "docker": "needs Docker; tests/test_container.py lints the Dockerfile",
    "enroot": "needs enroot and a registry",
    "lm_eval": "needs the extra eval; tests/hf/test_lm_eval.py calls it on an export",
    "pre-commit": "changes a clone's hooks",
}
"""Programs whose command lines nothing here can read, and why."""
MODULES_ELSEWHERE = {
    "megabyte_distill.harness": "needs the extra eval, whose command line it is; tests/hf/test_lm_eval.py calls it",
    "lm_eval": ELSEWHERE["lm_eval"],
}
TAKES_TRAINING_FLAGS = {"real_teacher.py"}
"""Scripts that hand on the flags that they do not know."""
READERS_OWN = (
    "corpus.jsonl", "chat.jsonl", "train.jsonl.xz", "heldout.jsonl.xz", "documents-*.jsonl", "shards/*.jsonl.zst",
    "checkpoints/", "/data/", "/runs/", "/lustre/", "/opt/",
)  # fmt: skip
"""Files that a command reads and no command of the pages makes: the reader brings them."""
WRITES = {
    "--save", "--output-prefix", "--megatron-path", "--hf-path", "--logits-save-dir", "--output", "--work-dir",
    "--plots",
}  # fmt: skip
_INLINE = re.compile(r"`((?:[A-Z_]+=\S+ )*(?:python3?|torchrun|bash|make|pip|pytest|sbatch) [^`]+)`")
_BLOCK = re.compile(r"^( *)```bash\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
_IN_REPOSITORY = re.compile(r"(?:tools|examples|benchmarks|scripts|tests|docs|megabyte_distill)/[\w./-]+")
_DATA = re.compile(r"[\w.*-]*/[\w./*-]+|[\w*-]+\.(?:jsonl|json|txt|xz|zst)")
_PLACEHOLDER = re.compile(r"[A-Z][A-Z0-9]*(?:/\S*)?")
_RECORDER = """#!/bin/bash
printf '%s\\0' "$PLACE" "${WORLD_SIZE:-1}" "${0##*/}" "$@" $'\\x1e' >> "$CALLS"
"""
_SBATCH = """#!/bin/bash
while [[ "$1" == --* ]]; do
    [[ "$1" != --nodes=* ]] || export SLURM_JOB_NUM_NODES=${1#*=} SLURM_NNODES=${1#*=}
    shift
done
export SLURM_SUBMIT_DIR=$PWD SLURM_JOB_NODELIST=n SLURM_JOB_ID=1
exec bash "$@"
"""
_SRUN = """#!/bin/bash
while [[ "$1" != bash && "$1" != torchrun ]]; do shift; done
exec "$@"
"""
_STAND_INS = {
    **dict.fromkeys(("python", "python3", "torchrun", "make", "pip", "pytest", *ELSEWHERE), _RECORDER),
    "sbatch": _SBATCH,
    "srun": _SRUN,
    "scontrol": "#!/bin/bash\necho node0\n",
}


@dataclass(frozen=True, slots=True)
class Call:
    """One program, as a page's command calls it."""

    place: str
    world_size: int
    words: tuple[str, ...]

    @property
    def shown(self) -> str:
        return f"{self.place}: {' '.join(self.words)}"


def blocks(page: Path) -> list[tuple[int, str]]:
    """(line, text) of every fenced bash block and of every command in backticks, in order."""
    text = page.read_text(encoding="utf-8")
    fenced = [(found.start(), re.sub(rf"^{found[1]}", "", found[2], flags=re.M)) for found in _BLOCK.finditer(text)]
    plain = re.sub(r"^ *```.*?^ *```", lambda found: " " * len(found[0]), text, flags=re.DOTALL | re.MULTILINE)
    inline = [(found.start(), found[1]) for found in _INLINE.finditer(plain)]
    return [(text.count("\n", 0, start) + 1, block) for start, block in sorted(fenced + inline)]


def calls_of(page: str, commands: Sequence[tuple[int, str]], folder: Path) -> list[Call]:
    """What bash calls when it runs a page's blocks one after the other in ``folder``, which must be empty.

    AssertionError where bash fails, as it does for a program without a stand-in.
    """
    programs = folder / "programs"
    programs.mkdir()
    for name, text in _STAND_INS.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    for name in ("bash", "dirname"):
        (programs / name).symlink_to(shutil.which(name) or f"/bin/{name}")
    place = folder / "clone"
    (place / ".venv" / "bin").mkdir(parents=True)
    (place / ".venv" / "bin" / "activate").touch()
    for path in ROOT.iterdir():
        if not path.name.startswith("."):
            (place / path.name).symlink_to(path)
    lines = [f"export PLACE={page}:{line}\n{block}\n" for line, block in commands]
    (folder / "page.sh").write_text("set -e\n" + "".join(lines), encoding="utf-8")
    environment = {"PATH": str(programs), "CALLS": str(folder / "calls"), "LC_ALL": "C.UTF-8"}
    (folder / "calls").touch()
    done = subprocess.run(
        ["bash", str(folder / "page.sh")], cwd=place, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, f"{page}: bash cannot run a command: {done.stderr}"
    records = (folder / "calls").read_text(encoding="utf-8").split("\x1e\0")[:-1]
    split = [tuple(record.split("\0")[:-1]) for record in records]
    return [Call(words[0], int(words[1]), words[2:]) for words in split]


def check_call(call: Call, made: set[str]) -> None:
    """Has the program read a call, unless it is listed as one that nothing here can read.

    ``made`` has what earlier commands write; what this one writes is added. AssertionError says what is wrong.
    """
    words = list(_without_ellipses(call.words))
    program, *rest = words
    if program in ELSEWHERE or (rest[:1] == ["-m"] and rest[1] in MODULES_ELSEWHERE):
        return
    _check_files(call, words, made)
    try:
        if program == "make":
            _check_make(rest)
        elif program == "pip":
            _check_pip(rest)
        elif program == "torchrun":
            _check_torchrun(rest)
        elif program == "pytest":
            _check_pytest(rest)
        else:
            _check_python(rest, call.world_size)
    except (ConfigError, SystemExit) as problem:
        raise AssertionError(f"{call.shown}\n{problem}") from problem


def _without_ellipses(words: Sequence[str]) -> Iterator[str]:
    """Without the … that stands for flags of before; the one behind a flag is its value."""
    for position, word in enumerate(words):
        if word != "…" or (position and words[position - 1].startswith("--") and words[position - 1].count("-") > 1):
            yield word


def _check_files(call: Call, words: Sequence[str], made: set[str]) -> None:
    flag = ""
    for word in words[1:]:
        if word.startswith("--"):
            flag = word
        elif _IN_REPOSITORY.fullmatch(word):
            assert (ROOT / word).exists() or flag in WRITES, f"{call.shown}\n{word} is not in the repository"
        elif flag in WRITES:
            made.add(word.rstrip("/"))
        elif _DATA.fullmatch(word) and not _PLACEHOLDER.fullmatch(word) and not word.startswith(READERS_OWN):
            is_made = any(word == one or word.startswith((f"{one}/", f"{one}_")) for one in made)
            assert is_made, f"{call.shown}\nno command before makes {word}; made: {sorted(made)}"
    if words[:2] == ["make", "demo"]:
        made.add("runs/tiny")


def _check_make(words: Sequence[str]) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert targets is not None
    for word in words:
        name, is_variable, _ = word.partition("=")
        if is_variable:
            assert f"$({name})" in makefile, f"make {word}: the Makefile reads no {name}"
        else:
            assert word in targets[1].split(), f"make {word}: the Makefile has {targets[1]}"


def _check_pip(words: Sequence[str]) -> None:
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert words[0] == "install", f"pip {words[0]}"
    flags = argparse.ArgumentParser(allow_abbrev=False)
    flags.add_argument("-c")
    flags.add_argument("wanted", nargs="+")
    for word in flags.parse_args(words[1:]).wanted:
        if own := re.fullmatch(r"\.(?:\[([\w,]+)\])?", word):
            assert set((own[1] or "").split(",")) - {""} <= extras.keys(), f"{word}: the extras are {sorted(extras)}"
        else:
            Requirement(word)


def _check_torchrun(words: Sequence[str]) -> None:
    from torch.distributed.run import get_args_parser

    asked = get_args_parser().parse_args(list(words))
    assert asked.training_script == "examples/pretrain_byte_kd.sh", asked.training_script
    ranks = int(asked.nproc_per_node) * int(str(asked.nnodes).rpartition(":")[2])
    check_training_flags(asked.training_script_args, ranks)


def check_training_flags(words: Sequence[str], world_size: int) -> None:
    """They are known, fit together and fit so many ranks, and none does nothing but for a stage that was left out."""
    from megabyte_distill.pretrain.example import Example

    idle: list[str] = []
    defaults = Example(ROOT / "examples" / "tiny").defaults(Path("runs/tiny"))
    # a dry run of Transformer Engine's layers needs no such package
    parse_arguments([*words, "--dry-run"], defaults, world_size=world_size, warn=idle.append)
    idle = [text for text in idle if "is not among --stages" not in text]
    if "--preset" not in words:  # two rows of the embedded example, which may grow
        idle = [text for text in idle if "updates grow" not in text]
    assert not idle, idle


def _check_pytest(words: Sequence[str]) -> None:
    flags = argparse.ArgumentParser(allow_abbrev=False)
    flags.add_argument("-ra", action="store_true")
    flags.add_argument("-k")
    flags.add_argument("paths", nargs="+")
    paths = flags.parse_args(list(words)).paths
    assert all((ROOT / path).exists() for path in paths), paths


def _check_python(words: Sequence[str], world_size: int) -> None:
    first, *rest = words
    if first == "-c":
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(rest[0], "-c", "exec"), {})
    elif [first, *rest[:1]] == ["-m", "pytest"]:
        _check_pytest(rest[1:])
    elif [first, *rest[:1]] == ["-m", "pip"]:
        _check_pip(rest[1:])
    elif [first, *rest[:1]] == ["-m", "venv"]:
        assert rest[1:] == [".venv"]
    elif first == "-m":
        place = ROOT / rest[0].replace(".", "/")
        if rest[0] == "megabyte_distill.memory":
            _check_memory(rest[1:])
        else:
            _check_script(place / "__main__.py" if place.is_dir() else place.with_suffix(".py"), rest[1:])
    elif first == "examples/pretrain_byte_kd.sh":
        check_training_flags(rest, world_size)
    else:
        _check_script(ROOT / first, rest)


class _Read(Exception):
    """A command line was read: the values that its flags refuse, and what is not the program's own."""

    def __init__(self, namespace: argparse.Namespace, left: Sequence[str]) -> None:
        super().__init__()
        self.refused, self.left = list(_refused(namespace)), left


def _refused(namespace: argparse.Namespace) -> Iterator[str]:
    """Of the tools' flags, which keep what is wrong with their values; a file that the reader brings may be missing."""
    yield from getattr(namespace, "missing", ())
    for name, value in vars(namespace).items():
        for one in value if isinstance(value, list) else [value]:
            problem = getattr(one, "problem", None)
            if problem and "there is none" not in problem:
                yield f"{name}: {problem}"


def _check_script(script: Path, words: Sequence[str]) -> None:
    """Runs the script until its command line is read."""
    source = script.read_text(encoding="utf-8")
    if "Parser" not in source:
        assert not words, f"{script} takes no flags"
        return
    errors = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        _stop_behind_parsing(patch)
        patch.setattr(sys, "argv", [str(script), *words])
        patch.syspath_prepend(str(script.parent))
        patch.setattr(os, "environ", dict(os.environ))
        try:
            with contextlib.redirect_stderr(errors):
                runpy.run_path(str(script), run_name="__main__")
        except _Read as read:
            refused, left = read.refused, read.left
        except SystemExit as end:
            raise AssertionError(f"{script.name} {' '.join(words)}\n{errors.getvalue()}") from end
        else:
            raise AssertionError(f"{script} read no command line")
    assert not refused, refused
    assert not left or script.name in TAKES_TRAINING_FLAGS, f"{script.name} does not know {' '.join(left)}"
    if left:
        check_training_flags(left, 1)


def _check_memory(words: Sequence[str]) -> None:
    """Up to the estimate, so that sizes and flags of training are looked at together."""
    from megabyte_distill.memory.__main__ import main

    def stop(*_: object, **__: object) -> None:
        raise _Read(argparse.Namespace(), ())

    errors = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(errors), contextlib.suppress(_Read):
        patch.setattr("megabyte_distill.memory.estimate.estimate", stop)
        main(list(words))
    assert not errors.getvalue(), errors.getvalue()


def _stop_behind_parsing(patch: pytest.MonkeyPatch) -> None:
    depth = 0

    def stopping(original: Callable[..., tuple[argparse.Namespace, list[str]]]) -> Callable[..., object]:
        def parse(self: argparse.ArgumentParser, *positional: object, **named: object) -> object:
            nonlocal depth
            depth += 1
            try:
                namespace, left = original(self, *positional, **named)
            finally:
                depth -= 1
            if depth:  # of a command below
                return namespace, left
            raise _Read(namespace, left)

        return parse

    for parser in (argparse.ArgumentParser, ToolParser):
        patch.setattr(parser, "parse_known_args", stopping(parser.parse_known_args))
