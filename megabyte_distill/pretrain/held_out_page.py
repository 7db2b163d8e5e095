"""A run's held-out text: where it lies now, and a page of it as the run's newest student cuts it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from megabyte_distill.config import STAGE_ORDER, Settings, read_run_config
from megabyte_distill.config.blend import parse_blend
from megabyte_distill.conversion.tokenizer_files import TOKEN_BYTES_FILE, TOKENIZER_FOLDER
from megabyte_distill.data.chunk_merging import merge_row
from megabyte_distill.data.dataset import ByteTokenDataset, Part, open_blend
from megabyte_distill.data.manifest import StoredPaths
from megabyte_distill.data.progress import Show, silent
from megabyte_distill.data.token_bytes import TokenBytes
from megabyte_distill.evaluation.held_out import held_out_rows
from megabyte_distill.evaluation.marked_text import mark_page, page_bytes
from megabyte_distill.evaluation.run_report import HeldOutPage
from megabyte_distill.runs import StageProgress, chunk_limit, last_stage, load_student, stage_progress

ROUTER_IS_TRAINED = STAGE_ORDER[STAGE_ORDER.index("1c") :]
"""Stages behind which the router's boundaries mean something."""


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
        with closing(show(f"page of {root.name}", page_bytes(rows, text_bytes))) as done:
            merged = (merge_row(row, limit) for row in rows)
            texts = mark_page(loaded.student, merged, at_most=text_bytes, done=done)
    except (ValueError, OSError) as error:
        return HeldOutPage(missing=f"no page: {error}")
    return HeldOutPage(texts=texts, source=page_source(progress.stage, progress.iteration, datasets[0].name))


def held_out_text(root: Path, *, at_most: int, flag: str) -> bytes:
    """The first bytes of a run's held-out text, a line end behind each document.

    ValueError where there is none; ``flag`` is the caller's that names another text, for the message.
    """
    settings = read_run_config(last_stage(root).checkpoint)
    if settings.data.mock_data:
        raise ValueError(f"{root} was trained on mock data, which is no text")
    table = TokenBytes.load(root / TOKENIZER_FOLDER / TOKEN_BYTES_FILE)
    text = bytearray()
    for dataset in _held_out(root, settings, (), table.hash, flag):
        for index in dataset.documents:
            if len(text) >= at_most:
                break
            text += dataset[index].byte_ids.tobytes() + b"\n"
    return bytes(text[:at_most])


def page_source(stage: str, iteration: int, data: str) -> str:
    """What a page shows: which student, which text."""
    return f"after {iteration:,} updates of stage {stage}, the beginning of {data}"


def _with_router(root: Path) -> StageProgress | None:
    found = [progress for stage in ROUTER_IS_TRAINED if (progress := stage_progress(root, stage)) is not None]
    return found[-1] if found else None


def _held_out(
    root: Path, settings: Settings, given: Sequence[str], tokenizer_hash: str, flag: str = "--data-path"
) -> list[ByteTokenDataset]:
    data = settings.data
    if given:
        return open_blend(given, tokenizer_hash=tokenizer_hash).datasets
    words = data.valid_data_path or data.data_path
    stems = [_where_it_lies(root, settings, entry.stem) for entry in parse_blend(words)]
    missing = [stem for stem in stems if not StoredPaths(stem).manifest.exists()]
    if missing:
        raise ValueError(f"the run's held-out data {missing[0]} is not there; {flag} says where it is")
    blend = open_blend(stems, tokenizer_hash=tokenizer_hash)
    if data.valid_data_path:
        return blend.datasets
    held_out = blend.part(Part.VALIDATION, data.split_shares).without_empty().datasets
    if not held_out:
        raise ValueError(f"the run held out no document; {flag} names other text")
    return held_out


def _where_it_lies(root: Path, settings: Settings, stem: str) -> str:
    """A stem is relative to where training was started, which the run's folder tells if that was relative as well."""
    save = Path(settings.checkpoint.save or "")
    parts, tail = root.resolve().parts, save.parts
    if save.is_absolute() or not tail or parts[-len(tail) :] != tail:
        return stem
    return str(Path(*parts[: -len(tail)]) / stem)
