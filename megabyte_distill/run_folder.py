"""What folders of runs say before anything of them is loaded; it needs neither torch nor megatron."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from megabyte_distill.config.stage import STAGE_ORDER
from megabyte_distill.files import write_whole

TEACHER_FILE = "teacher.json"
"""At a run's root: names the teacher."""


def is_run(folder: Path) -> bool:
    """True for the root of a run (not for a converted teacher)."""
    return (folder / TEACHER_FILE).exists()


def require_run(root: Path) -> None:
    """ValueError where a folder is no run's root."""
    if is_run(root):
        return
    run, stage = split_stage(root)
    if stage is not None:
        raise ValueError(
            f"{root} is a stage of a run; give the run's own folder, {run}, which has {', '.join(_stages_of(run))} "
            "(--stage, where the tool takes one)"
        )
    what = "is not a run" if root.is_dir() else "is not a folder"
    raise ValueError(f"{root} {what}: expected a folder written by training, with {TEACHER_FILE} in it")


def require_stage(root: Path, stage: str) -> None:
    """ValueError where a run has no folder of a stage."""
    if not (root / stage).is_dir():
        raise ValueError(
            f"{root} has no stage {stage}; it has {', '.join(_stages_of(root)) or 'none'}: take one of these, or train "
            f"it (--stages {stage})"
        )


def _stages_of(run: Path) -> list[str]:
    return [name for name in STAGE_ORDER if (run / name).is_dir()]


def run_names(roots: Sequence[Path]) -> list[str]:
    """What runs are called: by the folder's name, or by the path where two have the same. ValueError for twins."""
    resolved = [root.resolve() for root in roots]
    for number, root in enumerate(resolved):
        if root in resolved[:number]:
            raise ValueError(f"{roots[number]} is given twice; give each run once")
    names = [root.name for root in resolved]
    return [name if names.count(name) == 1 else str(root) for name, root in zip(names, resolved, strict=True)]


def split_stage(folder: Path) -> tuple[Path, str | None]:
    """(run, stage) of RUN/<stage>; (folder, None) of anything else."""
    resolved = folder.resolve()
    is_stage = resolved.name in STAGE_ORDER and is_run(resolved.parent)
    return (resolved.parent, resolved.name) if is_stage else (folder, None)


def write_teacher_path(root: Path, teacher: Path, identity: str | None) -> None:
    """Makes an existing folder a run that was distilled from the teacher; ``identity``: which weights that has."""
    content = {"teacher": str(teacher.resolve()), "identity": identity}
    write_whole(root / TEACHER_FILE, (json.dumps(content) + "\n").encode())


def teacher_path(root: Path) -> Path:
    """Where the run's teacher lies, as recorded at its start."""
    return Path(json.loads((root / TEACHER_FILE).read_text(encoding="utf-8"))["teacher"])


def recorded_teacher(root: Path) -> str | None:
    """Which weights the run's teacher had at its start; None where nothing was recorded, as in earlier versions."""
    identity: str | None = json.loads((root / TEACHER_FILE).read_text(encoding="utf-8")).get("identity")
    return identity


def find_run_teacher(root: Path, override: Path | None = None) -> Path:
    """The folder of a run's teacher; ``override`` where it moved. ValueError where it is not there."""
    path = override or teacher_path(root)
    if not path.is_dir():
        raise ValueError(f"the teacher of {root} should be at {path}, which is not a directory; give --teacher")
    return path
