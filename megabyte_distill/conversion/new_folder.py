"""A folder that is complete or absent: filled under a temporary name beside it, then renamed."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from megabyte_distill.files import fsync, fsync_tree
from megabyte_distill.run_folder import is_run

_PARTIAL = ".incomplete"
_REPLACED = ".replaced"


EXPORT_MARKER = ".exported_by_megabyte_distill"
"""A file in every exported folder: only those are overwritten, not a download that looks alike."""


@contextlib.contextmanager
def new_folder(final: Path, *, overwrite: bool, marker: str) -> Iterator[Path]:
    """Yields an empty folder to fill, which becomes ``final`` when the block ends and vanishes when it raises.

    The disk holds all of it before it gets that name; a link keeps pointing to the folder. ValueError as
    :func:`check_replaceable`. The file ``marker`` is made where the block does not.
    """
    final = final.resolve()
    partial = final.with_name(final.name + _PARTIAL)
    replaced = final.with_name(final.name + _REPLACED)
    if replaced.exists() and not final.exists():  # a crash between the two renames
        os.replace(replaced, final)
    check_replaceable(final, overwrite=overwrite, marker=marker)
    for leftover in (partial, replaced):
        if leftover.exists() and not (leftover / marker).is_file() and any(leftover.iterdir()):
            raise ValueError(f"{leftover} is in the way and is not an earlier output's rest; move it")
    final.parent.mkdir(parents=True, exist_ok=True)
    for leftover in (partial, replaced):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir()
    try:
        (partial / marker).touch()
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
    """ValueError where ``final`` exists without ``overwrite``, or is not an earlier output.

    That is a folder with a file ``marker`` in it, and no run: a run has the files of a converted teacher, and more.
    """
    if not final.exists():
        return
    if not final.is_dir():
        raise ValueError(f"{final} exists and is not a directory; choose another output")
    if not any(final.iterdir()):
        return
    if not overwrite:
        raise ValueError(f"{final} exists; choose another output or give --overwrite")
    if is_run(final):
        raise ValueError(f"{final} is the folder of a run; --overwrite will not remove it: choose another output")
    if not (final / marker).is_file():
        raise ValueError(f"{final} has no {marker}, so it is not an earlier output; --overwrite will not remove it")
