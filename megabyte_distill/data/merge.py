"""The partitions of one run, made on one machine or on many, become one data set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from megabyte_distill.data.dataset_writer import DatasetWriter, Origin, is_complete, remove_dataset
from megabyte_distill.data.file_lock import only_process
from megabyte_distill.data.manifest import Manifest, StoredPaths
from megabyte_distill.data.partitions import find_parts
from megabyte_distill.data.token_bytes import TokenBytes


def merge_partitions(
    prefix: str | Path,
    keys: Sequence[str],
    *,
    count: int | None = None,
    overwrite: bool = False,
    keep: bool = False,
) -> list[StoredPaths]:
    """Joins the partitions under ``prefix`` into the data sets that a run without partitions writes, byte for byte.

    ``count``: number of partitions, where runs of several counts lie there. The partitions are removed at the end
    unless ``keep``. A key that was merged from these partitions before (an interrupted merge) is left as it is.
    ValueError where a partition is missing or damaged, or was cut from other files, made with another tokenizer or
    other settings; then nothing is written.
    """
    with only_process(Path(f"{prefix}.lock"), lambda holder: f"process {holder} is writing {prefix}; let it end"):
        parts = {StoredPaths.of(prefix, key): find_parts(prefix, key, count) for key in keys}
        manifests = {paths: _manifests_of(of_key) for paths, of_key in parts.items()}
        wanted = {
            paths: of_key for paths, of_key in parts.items() if overwrite or not _is_merged(paths, manifests[paths])
        }
        with ExitStack() as stack:
            writers = [_merged(stack, paths, of_key, manifests[paths]) for paths, of_key in wanted.items()]
            for writer in writers:
                writer.publish()
        if not keep:
            for of_key in parts.values():
                for part in of_key:
                    remove_dataset(part)
    return list(parts)


def _manifests_of(parts: Sequence[StoredPaths]) -> list[Manifest]:
    manifests = [Manifest.load(part.manifest) for part in parts]
    for index, (part, manifest) in enumerate(zip(parts, manifests, strict=True)):
        _check_alike(part, manifest, parts[0], manifests[0])
        if manifest.partition != (index, len(parts)):
            raise ValueError(
                f"{part.manifest}: says partition {manifest.partition}, its name {index, len(parts)}: renamed or "
                "damaged, preprocess that partition again"
            )
    for path, times in Counter(entry["path"] for manifest in manifests for entry in manifest.inputs).items():
        if times > 1:
            raise ValueError(f"{parts[0].manifest}: {path} is in several partitions; preprocess them again")
    return manifests


def _is_merged(paths: StoredPaths, manifests: Sequence[Manifest]) -> bool:
    """Whether an earlier merge of the same partitions finished this key. ValueError where something else lies there."""
    if not is_complete(paths):
        return False
    found, first = Manifest.load(paths.manifest), manifests[0]
    same = (
        found.settings == first.settings
        and found.tokenizer_hash == first.tokenizer_hash
        and found.append_eod == first.append_eod
        and [entry.get("sha256") for entry in found.inputs] == [e.get("sha256") for m in manifests for e in m.inputs]
        and found.documents == sum(manifest.documents for manifest in manifests)
    )
    if not same:
        raise ValueError(f"{paths.byte_prefix}.idx exists and is another data set; pass --overwrite to replace it")
    return True


def _merged(
    stack: ExitStack, paths: StoredPaths, parts: Sequence[StoredPaths], manifests: Sequence[Manifest]
) -> DatasetWriter:
    """A data set that is written and not yet published."""
    first = manifests[0]
    table = TokenBytes.load(parts[0].token_table) if first.has_tokens else None
    writer = stack.enter_context(DatasetWriter(paths, table, loss_mask=first.loss_mask))
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
    return writer


def _check_alike(part: StoredPaths, manifest: Manifest, other: StoredPaths, first: Manifest) -> None:
    compared = ("tokenizer_hash", "vocab_size", "append_eod", "loss_mask", "versions")
    wrong = [
        f"{name}: {getattr(manifest, name)!r}, {getattr(first, name)!r} in {other.manifest.name}"
        for name in compared
        if getattr(manifest, name) != getattr(first, name)
    ]
    names = sorted({*manifest.settings, *first.settings})
    wrong += [
        f"{name}: {manifest.settings.get(name)!r}, {first.settings.get(name)!r} in {other.manifest.name}"
        for name in names
        if manifest.settings.get(name) != first.settings.get(name)
    ]
    if wrong:
        raise ValueError(
            f"{part.manifest}: made with other settings or cut from other files ({'; '.join(wrong)}); preprocess that "
            "partition again"
        )
