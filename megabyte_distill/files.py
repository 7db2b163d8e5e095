"""Files that are complete or absent, also after a crash: written under another name, on the disk, then renamed."""

from __future__ import annotations

import os
from pathlib import Path

PARTIAL_SUFFIX = ".partial"
"""Appended to the name of a file that is still being written."""


def write_whole(final: Path, content: bytes) -> None:
    """Writes a small file that is complete or what it was before, durably."""
    write_and_sync(partial_path(final), content)
    publish(final)


def partial_path(final: Path) -> Path:
    """Where ``final`` is written before it is complete."""
    return final.with_name(final.name + PARTIAL_SUFFIX)


def write_and_sync(path: Path, content: bytes) -> None:
    """Writes a small file and waits until the disk has it."""
    with open(path, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def publish(final: Path) -> None:
    """Gives a finished :func:`partial_path` its final name, durably."""
    os.replace(partial_path(final), final)
    fsync(final.parent)


def fsync(path: Path) -> None:
    """Has the disk hold a file, or the names in a folder, before it returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(folder: Path) -> None:
    """Has the disk hold everything below ``folder``, names included, before it returns."""
    for path in [*folder.rglob("*"), folder]:
        fsync(path)
