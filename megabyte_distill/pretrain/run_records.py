"""What a run left on disk, gathered for its report: of a finished run, one that is being trained, or a damaged one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megabyte_distill.config import STAGE_ORDER
from megabyte_distill.config.run_config import RUN_CONFIG_NAME, flatten
from megabyte_distill.conversion.model_config import MODEL_CONFIG_FILE
from megabyte_distill.evaluation.metrics_log import Curves, read_metrics
from megabyte_distill.evaluation.run_report import HeldOutPage, RunRecord, StageRecord
from megabyte_distill.run_folder import require_run
from megabyte_distill.runs import stage_progress
from megabyte_distill.training.checkpoint import read_loop_state
from megabyte_distill.training.logging import METRICS_FILE

SUMMARY_FILE, BOUNDARIES_FILE = "summary.json", "boundaries.png"
_PNG = b"\x89PNG"


def run_record(root: Path, name: str, page: HeldOutPage) -> RunRecord:
    """What there is of a run; whatever is missing or cannot be read is a note. ValueError where it is no run."""
    require_run(root)
    notes: list[str] = []
    found = [pair for stage in STAGE_ORDER if (pair := _stage_record(root, stage, notes)) is not None]
    config = found[-1][1] if found else {}
    shared = {name: value for name, value in _object(config, "settings").items() if name != "stages"}
    return RunRecord(
        name=name,
        folder=str(root),
        curves=_curves(root, notes),
        summary=_json(root / SUMMARY_FILE, notes),
        stages=[record for record, _ in found],
        settings={**flatten(shared), **flatten(_json(root / MODEL_CONFIG_FILE, notes) or {})},
        versions=_versions(config),
        page=page,
        boundaries=_picture(root / BOUNDARIES_FILE),
        notes=notes,
    )


def _curves(root: Path, notes: list[str]) -> Curves:
    try:
        return read_metrics(root / METRICS_FILE)
    except ValueError as error:
        notes.append(str(error))
        return {}


def _stage_record(root: Path, stage: str, notes: list[str]) -> tuple[StageRecord, Mapping[str, Any]] | None:
    """A stage and the content of its newest checkpoint's run_config.yaml; None where there is no checkpoint."""
    try:
        progress = stage_progress(root, stage)
        if progress is None:
            return None
        counters = read_loop_state(progress.checkpoint)["progress"]
    except (ValueError, OSError) as error:
        notes.append(f"stage {stage}: {error}")
        return None
    config = _json(progress.checkpoint / RUN_CONFIG_NAME, notes) or {}
    record = StageRecord(
        stage=stage,
        iteration=progress.iteration,
        train_iters=progress.train_iters,
        consumed_bytes=int(counters["consumed_bytes"]),
        seconds=float(counters["seconds"]),
        settings=flatten(_object(_object(_object(config, "settings"), "stages"), stage)),
    )
    return record, config


def _object(content: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """An entry that should be an object; empty where it is not there or something else."""
    value = content.get(name)
    return value if isinstance(value, dict) else {}


def _versions(config: Mapping[str, Any]) -> dict[str, str]:
    own = {"megabyte-distill": config["megabyte_distill"]} if "megabyte_distill" in config else {}
    return {name: str(value) for name, value in {**own, **_object(config, "versions")}.items()}


def _json(path: Path, notes: list[str]) -> dict[str, Any] | None:
    """The object in a file; None where there is none, or none that can be read, which is noted."""
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        notes.append(f"{path} cannot be read ({error}) and is left out")
        return None
    if isinstance(content, dict):
        return content
    notes.append(f"{path} holds {type(content).__name__} and is left out; expected an object")
    return None


def _picture(path: Path) -> bytes | None:
    try:
        content = path.read_bytes()
    except OSError:
        return None
    return content if content.startswith(_PNG) else None
