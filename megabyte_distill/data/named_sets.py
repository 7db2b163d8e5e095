"""The words of a tool's --data-path: which data sets they name, before any is opened."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megabyte_distill.config.blend import parse_blend
from megabyte_distill.data.manifest import StoredPaths


def set_names(words: Sequence[str]) -> dict[str, str]:
    """Name → stem of data sets given as STEM or NAME=STEM, weights between them left out.

    A stem alone is called by its last part without ``_document``; where two would be called alike, by the whole stem.
    ValueError for a name that is given twice.
    """
    pairs = [_named(entry.stem) for entry in parse_blend(words)]
    short = [Path(stem).name.removesuffix("_document") for _, stem in pairs]
    names: dict[str, str] = {}
    for (given, stem), own in zip(pairs, short, strict=True):
        name = given or (own if short.count(own) == 1 else stem)
        if name in names:
            raise ValueError(f"two data sets are called {name!r}; give them names, as first={names[name]}")
        names[name] = stem
    return names


def _named(word: str) -> tuple[str, str]:
    """(name, stem) of NAME=STEM; a stem that has a "=" in it and exists is taken as it stands."""
    name, separator, stem = word.partition("=")
    is_stem = not separator or "/" in name or StoredPaths(word).manifest.exists()
    return ("", word) if is_stem else (name, stem)


def set_problems(words: Sequence[str], flag: str = "--data-path", *, named: bool = False) -> list[str]:
    """What is wrong with the words and with where they point, in the terms of who typed them after ``flag``.

    Data sets are not opened: what is inside may still be refused. ``named``: the words may be NAME=STEM.
    """
    try:
        found = set_names(words).values() if named else [entry.stem for entry in parse_blend(words)]
        stems = [StoredPaths(stem) for stem in found]
    except ValueError as error:
        return [f"{flag}: {error}"]
    return [
        f"{flag}: got {paths.stem}, expected the stem PREFIX_KEY_document of a data set that tools/preprocess_bytes.py "
        f"wrote; {paths.manifest} is not there"
        for paths in stems
        if not paths.manifest.is_file()
    ]
