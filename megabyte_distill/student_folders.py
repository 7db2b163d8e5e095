"""A student that can generate, from wherever it lies: a run, one of its stages, or an exported folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from megabyte_distill.config.ranges import BOUNDARY_THRESHOLD
from megabyte_distill.conversion.hf_config import CONFIG_FILE, HfConfig
from megabyte_distill.conversion.model_config import MODEL_CONFIG_FILE
from megabyte_distill.run_folder import is_run, require_stage, split_stage

if TYPE_CHECKING:
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
