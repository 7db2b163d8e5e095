"""A folder that is complete or absent: filled under a temporary name beside it, then renamed."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from megabyte_distill.training.checkpoint import fsync, fsync_tree

_PARTIAL = ".incomplete"
_REPLACED = ".replaced"


@contextlib.contextmanager
def new_folder(final: Path, *, overwrite: bool, marker: str) -> Iterator[Path]:
    """Yields an empty folder to fill, which becomes ``final`` when the block ends and vanishes when it raises.

    The disk holds all of it before it gets that name.
    ValueError where ``final`` exists without ``overwrite``, or holds anything but no file ``marker``: overwriting
    replaces earlier output, never somebody's other folder.
    """
    check_replaceable(final, overwrite=overwrite, marker=marker)
    partial = final.with_name(final.name + _PARTIAL)
    replaced = final.with_name(final.name + _REPLACED)
    final.parent.mkdir(parents=True, exist_ok=True)
    for leftover in (partial, replaced):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        fsync_tree(partial)
        if final.exists():
            os.replace(final, replaced)
        os.replace(partial, final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        if replaced.exists() and not final.exists():
            os.replace(replaced, final)
        raise
    fsync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def check_replaceable(final: Path, *, overwrite: bool, marker: str) -> None:
    """ValueError unless ``final`` may be written; see :func:`new_folder`."""
    if not final.exists():
        return
    if not final.is_dir():
        raise ValueError(f"{final} exists and is not a directory; choose another output")
    if not any(final.iterdir()):
        return
    if not overwrite:
        raise ValueError(f"{final} exists; choose another output or give --overwrite")
    if not (final / marker).is_file():
        raise ValueError(f"{final} has no {marker}, so it is not an earlier output; --overwrite will not remove it")
