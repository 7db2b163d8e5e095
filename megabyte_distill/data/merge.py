"""The partitions of one run, made on one machine or on many, become one data set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megabyte_distill.data.dataset_writer import DatasetWriter, Origin, is_complete, remove_dataset
from megabyte_distill.data.file_lock import only_process
from megabyte_distill.data.manifest import Manifest, StoredPaths
from megabyte_distill.data.partitions import find_parts
from megabyte_distill.data.token_bytes import TokenBytes


def merge_partitions(
    prefix: str | Path, keys: Sequence[str], *, overwrite: bool = False, keep: bool = False
) -> list[StoredPaths]:
    """Joins the partitions under ``prefix`` into the data sets that a run without partitions writes, byte for byte.

    The partitions are removed at the end unless ``keep``. ValueError where one is missing or damaged, or was made with
    another tokenizer or other settings; then nothing is written.
    """
    merged = []
    with only_process(Path(f"{prefix}.lock"), lambda holder: f"process {holder} is writing {prefix}; let it end"):
        parts = {key: find_parts(prefix, key) for key in keys}
        for key in keys:
            paths = StoredPaths.of(prefix, key)
            if is_complete(paths) and not overwrite:
                raise ValueError(f"{paths.byte_prefix}.idx exists; pass --overwrite to replace it")
            _merge(paths, parts[key])
            merged.append(paths)
        if not keep:
            for of_key in parts.values():
                for part in of_key:
                    remove_dataset(part)
    return merged


def _merge(paths: StoredPaths, parts: Sequence[StoredPaths]) -> None:
    manifests = [Manifest.load(part.manifest) for part in parts]
    first = manifests[0]
    for part, manifest in zip(parts, manifests, strict=True):
        _check_alike(part, manifest, parts[0], first)
    table = TokenBytes.load(parts[0].token_table) if first.has_tokens else None
    with DatasetWriter(paths, table) as writer:
        for part, manifest in zip(parts, manifests, strict=True):
            writer.extend(part, manifest)
        writer.finish(
            Origin(
                inputs=[entry for manifest in manifests for entry in manifest.inputs],
                tokenizer=first.tokenizer,
                settings=first.settings,
                versions=first.versions,
                append_eod=first.append_eod,
                partition=None,
            )
        )
        writer.publish()


def _check_alike(part: StoredPaths, manifest: Manifest, other: StoredPaths, first: Manifest) -> None:
    compared = ("tokenizer_hash", "vocab_size", "append_eod", "settings", "versions")
    wrong = [
        f"{name}: {getattr(manifest, name)!r}, {getattr(first, name)!r} in {other.manifest.name}"
        for name in compared
        if getattr(manifest, name) != getattr(first, name)
    ]
    if wrong:
        raise ValueError(
            f"{part.manifest}: made with other settings ({'; '.join(wrong)}); preprocess that partition again"
        )
