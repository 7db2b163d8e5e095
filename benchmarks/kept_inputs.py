"""What a work folder was made of, so that a later call with other inputs does not go on with the old ones."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megabyte_distill.data.inputs import find_inputs

NAME = "inputs.json"
EMBEDDED = "the embedded one"


def of_folder(folder: Path | None) -> list[list[Any]]:
    """[path, bytes, time of change] of the files right in a folder; nothing of None. ValueError where there is none."""
    if folder is None:
        return []
    files = sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
    if not files:
        raise ValueError(f"got {folder}, expected a folder with files; see `tools/convert_checkpoint.py import --help`")
    return [_described(path) for path in files]


def of_texts(texts: Sequence[Path] | None) -> list[list[Any]]:
    """The same of preprocessing's inputs. ValueError where one is not there or not understood."""
    files = find_inputs(texts) if texts else []
    if any(file.is_stdin for file in files):
        raise ValueError("got standard input as a text, expected files: a later call could not tell it from another")
    return [_described(Path(file.path)) for file in files]


def _described(path: Path) -> list[Any]:
    found = path.stat()
    return [str(path.resolve()), found.st_size, found.st_mtime_ns]


def keep(folder: Path, inputs: dict[str, list[list[Any]]], made: Sequence[Path]) -> None:
    """Write into a work folder what it is made of, by flag. ValueError where that is something else, or not known and
    one of ``made`` is there.
    """
    record = folder / NAME
    if record.exists():
        kept = json.loads(record.read_text(encoding="utf-8"))
        if differing := [_difference(flag, kept[flag], own) for flag, own in inputs.items() if kept[flag] != own]:
            raise ValueError(f"{folder} holds what earlier inputs gave: {'; '.join(differing)}. {_WAY_OUT}")
    elif others := [path for path in made if path.exists()]:
        raise ValueError(f"got {others[0]} but no {record}, expected to see what it was made of. {_WAY_OUT}")
    record.write_text(json.dumps(inputs), encoding="utf-8")


_WAY_OUT = "Give another --work-dir, or the same inputs, or remove the folder"


def _difference(flag: str, kept: list[list[Any]], own: list[list[Any]]) -> str:
    before, now = ([path for path, *_ in files] for files in (kept, own))
    if before == now:
        return f"got {flag} {_names(now)}, expected it as it was: it has changed since"
    return f"got {flag} {_names(now)}, expected {_names(before)}"


def _names(paths: Sequence[str]) -> str:
    return f"{paths[0]}{' …' if len(paths) > 1 else ''}" if paths else EMBEDDED
