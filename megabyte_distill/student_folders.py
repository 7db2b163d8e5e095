"""A student that can generate, from wherever it lies: a run, one of its stages, or an exported folder; or a teacher."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from megabyte_distill.config.ranges import BOUNDARY_THRESHOLD
from megabyte_distill.conversion.hf_config import CONFIG_FILE, HfConfig
from megabyte_distill.conversion.model_config import MODEL_CONFIG_FILE
from megabyte_distill.conversion.student_folder import MODEL_TYPE
from megabyte_distill.run_folder import is_run, require_stage, split_stage, teacher_path

if TYPE_CHECKING:
    from megabyte_distill.conversion.teacher_folder import Teacher
    from megabyte_distill.model.student import Student


@contextmanager
def open_student(folder: Path, stage: str | None = None, device: str | None = None) -> Iterator[Student]:
    """The student of a run (RUN, RUN/2a) or of an export, in evaluation mode; a run's needs the process groups inside.

    Args:
        folder: where it lies.
        stage: of a run, default: the last complete one.
        device: of an export, default: a GPU where there is one. A run's student lies where training has it.

    Raises:
        ValueError: where the folder is neither, or its decoder is untrained.
    """
    require_student(folder)
    require_stage_of(folder, stage)
    # megatron and torch take seconds to import, which --help and a bad prompt should not
    if _is_of_run(folder):
        from megabyte_distill.parallel.process_groups import world
        from megabyte_distill.runs import load_student, speaking_stage

        root, named = split_stage(folder)
        with world():
            yield load_student(root, speaking_stage(root, stage or named)).student
        return
    import torch

    from megabyte_distill.hf.exported_folder import load_exported

    yield load_exported(folder, device or ("cuda" if torch.cuda.is_available() else "cpu"))


@contextmanager
def open_teacher(folder: Path) -> Iterator[Teacher]:
    """The teacher of :func:`teacher_of` in fp32 and evaluation mode; the process groups that it needs last as long."""
    checkpoint = teacher_of(folder)
    import torch

    from megabyte_distill.conversion.teacher_folder import load_teacher
    from megabyte_distill.parallel.process_groups import world

    with world():
        teacher = load_teacher(checkpoint, dtype=torch.float32)
        teacher.backbone.requires_grad_(False).eval()
        yield teacher


def teacher_of(folder: Path) -> Path:
    """Where the teacher of a run lies, or ``folder`` where it is a converted teacher; nothing is loaded.

    ValueError where it is neither, or the run's teacher is not where the run recorded it.
    """
    if is_run(folder):
        path = teacher_path(folder)
        if path.is_dir():
            return path
        raise ValueError(f"the teacher of {folder} should be at {path}, which is not a directory; give its own folder")
    root, stage = split_stage(folder)
    if stage is not None:
        raise ValueError(f"{folder} is a stage of a run, and all of them have one teacher; give the run, {root}")
    if (folder / MODEL_CONFIG_FILE).is_file():
        return folder
    what = "is not a run and not a converted teacher"
    if (folder / CONFIG_FILE).is_file():
        if HfConfig.read(folder).fields.get("model_type") != MODEL_TYPE:
            raise ValueError(
                f"{folder} is a Hugging Face folder, which is not converted; convert it with "
                "tools/convert_checkpoint.py import, and give the folder that this writes"
            )
        what = "is an exported student, which has no teacher"
    raise ValueError(
        f"{folder} {what if folder.is_dir() else 'is not a folder'}; expected a folder written by training, or by "
        f"convert_checkpoint.py import ({MODEL_CONFIG_FILE} in it)"
    )


def require_student(folder: Path) -> None:
    """ValueError where a folder is neither a run (or a stage of one) nor an export; nothing is loaded."""
    if _is_of_run(folder) or (folder / CONFIG_FILE).is_file():
        return
    what = "is not a run" if folder.is_dir() else "is not a folder, no run"
    what = "is a converted teacher" if (folder / MODEL_CONFIG_FILE).is_file() else what
    raise ValueError(
        f"{folder} {what} and not an exported student; expected a folder written by training (teacher.json in it) "
        f"or by convert_checkpoint.py export ({CONFIG_FILE} in it)"
    )


def require_stage_of(folder: Path, stage: str | None) -> None:
    """ValueError where a student's folder cannot have the weights of a stage; None is the one it has last."""
    if stage is None:
        return
    if not _is_of_run(folder):
        raise ValueError(f"{folder} is an export, which holds the weights of one stage; leave stage {stage} out")
    require_stage(split_stage(folder)[0], stage)


def _is_of_run(folder: Path) -> bool:
    return is_run(folder) or split_stage(folder)[1] is not None


def stored_threshold(folder: Path) -> float | None:
    """The boundary threshold that an export was written with; None where it has none, and for a run.

    ValueError where the folder's config.json cannot be read, or says what no threshold is.
    """
    if not (folder / CONFIG_FILE).is_file():
        return None
    config = HfConfig.read(folder)
    threshold = config.fields.get("boundary_threshold")
    if threshold is None:
        return None
    if not isinstance(threshold, int | float):
        raise ValueError(f"{config.where}: boundary_threshold is {threshold!r}; expected a number or null")
    BOUNDARY_THRESHOLD.require(f"{config.where}: boundary_threshold", threshold)
    return threshold
