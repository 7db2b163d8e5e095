"""What a run left on disk, gathered for its report: of a finished run, one that is being trained, or a damaged one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from megabyte_distill.config import STAGE_ORDER, Settings, read_run_config
from megabyte_distill.config.blend import parse_blend
from megabyte_distill.config.run_config import RUN_CONFIG_NAME, flatten
from megabyte_distill.conversion.model_config import MODEL_CONFIG_FILE
from megabyte_distill.conversion.run_folder import require_run
from megabyte_distill.data.chunk_merging import merge_row
from megabyte_distill.data.dataset import ByteTokenDataset, open_blend, split_documents
from megabyte_distill.data.manifest import StoredPaths
from megabyte_distill.data.progress import Show, counted, silent
from megabyte_distill.evaluation.held_out import held_out_rows
from megabyte_distill.evaluation.marked_text import mark_page
from megabyte_distill.evaluation.metrics_log import Curves, read_metrics
from megabyte_distill.evaluation.run_report import HeldOutPage, RunRecord, StageRecord
from megabyte_distill.runs import StageProgress, chunk_limit, load_student, stage_progress
from megabyte_distill.training.checkpoint import read_loop_state
from megabyte_distill.training.logging import METRICS_FILE

SUMMARY_FILE, BOUNDARIES_FILE = "summary.json", "boundaries.png"
ROUTER_IS_TRAINED = STAGE_ORDER[STAGE_ORDER.index("1c") :]
"""Stages behind which the router's boundaries mean something."""
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


def held_out_page(root: Path, *, text_bytes: int, data_path: Sequence[str] = (), show: Show = silent) -> HeldOutPage:
    """The first ``text_bytes`` of held-out text as the newest student of a run cuts it, or why that cannot be had.

    ``data_path``: stems to read instead of the data the run was trained with. Needs process groups.
    """
    try:
        progress = _with_router(root)
        if progress is None:
            return HeldOutPage(missing=f"no page: no checkpoint of {', '.join(ROUTER_IS_TRAINED)}, which have a router")
        settings = read_run_config(progress.checkpoint)
        if not data_path and settings.data.mock_data:
            return HeldOutPage(missing="no page: the run was trained on mock data; --data-path names text to show")
        loaded = load_student(root, progress.stage)
        datasets = _held_out(root, settings, data_path, loaded.token_bytes.hash)
        config = settings.stages[progress.stage]
        limit = chunk_limit(progress.checkpoint)
        rows = held_out_rows(
            datasets, row_bytes=config.seq_length, chunk_bucket=config.chunk_bucket, max_bytes=text_bytes
        )
        with closing(show(f"page of {root.name}", len(rows), " rows")) as done:
            merged = (merge_row(row, limit) for row in counted(rows, done, lambda row: 1))
            texts = mark_page(loaded.student, merged, at_most=text_bytes)
    except (ValueError, OSError) as error:
        return HeldOutPage(missing=f"no page: {error}")
    return HeldOutPage(texts=texts, source=page_source(progress.stage, progress.iteration, datasets[0].name))


def page_source(stage: str, iteration: int, data: str) -> str:
    """What a page shows: which student, which text."""
    return f"after {iteration:,} updates of stage {stage}, the beginning of {data}"


def _with_router(root: Path) -> StageProgress | None:
    found = [progress for stage in ROUTER_IS_TRAINED if (progress := stage_progress(root, stage)) is not None]
    return found[-1] if found else None


def _held_out(root: Path, settings: Settings, given: Sequence[str], tokenizer_hash: str) -> list[ByteTokenDataset]:
    data = settings.data
    if given:
        return open_blend(given, tokenizer_hash=tokenizer_hash)[0]
    words = data.valid_data_path or data.data_path
    stems = [_where_it_lies(root, settings, entry.stem) for entry in parse_blend(words)]
    missing = [stem for stem in stems if not StoredPaths(stem).manifest.exists()]
    if missing:
        raise ValueError(f"the run's held-out data {missing[0]} is not there; --data-path says where it is")
    datasets = open_blend(stems, tokenizer_hash=tokenizer_hash)[0]
    if data.valid_data_path:
        return datasets
    shares = [split_documents(len(dataset), data.split_shares)[1] for dataset in datasets]
    held_out = [dataset.subset(part) for dataset, part in zip(datasets, shares, strict=True) if len(part)]
    if not held_out:
        raise ValueError("the run held out no document; --data-path names text to show")
    return held_out


def _where_it_lies(root: Path, settings: Settings, stem: str) -> str:
    """A stem is relative to where training was started, which the run's folder tells if that was relative as well."""
    save = Path(settings.checkpoint.save or "")
    parts, tail = root.resolve().parts, save.parts
    if save.is_absolute() or not tail or parts[-len(tail) :] != tail:
        return stem
    return str(Path(*parts[: -len(tail)]) / stem)
