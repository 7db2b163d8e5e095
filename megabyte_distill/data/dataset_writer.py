"""The files of one data set, which appear together: bytes, tokens, token table, perhaps a loss mask, manifest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from megabyte_distill.data.encoding import EncodedDocuments, token_dtype
from megabyte_distill.data.formats import IndexedReader, IndexedWriter
from megabyte_distill.data.loss_mask import marked_count
from megabyte_distill.data.manifest import NO_TOKENIZER, Manifest, StoredPaths
from megabyte_distill.data.skipped import Skipped
from megabyte_distill.data.token_bytes import TokenBytes
from megabyte_distill.files import partial_path, publish, write_and_sync


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """What a manifest says beside the counts."""

    inputs: Sequence[Mapping[str, Any]]
    tokenizer: str
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    append_eod: bool
    partition: tuple[int, int] | None


class DatasetWriter:
    """Writes a data set; nothing has its final name before :meth:`publish`. Leaving by an exception removes it all."""

    def __init__(self, paths: StoredPaths, table: TokenBytes | None, *, loss_mask: bool = False) -> None:
        """``table`` None writes bytes alone; with ``loss_mask`` the documents come with their spans."""
        self.paths, self._table = paths, table
        self.documents = self.bytes = self.tokens = self.normalized = self.marked = 0
        self.skipped = Skipped()
        self._stack = ExitStack()
        paths.byte_prefix.parent.mkdir(parents=True, exist_ok=True)
        self._bytes = self._stack.enter_context(IndexedWriter(paths.byte_prefix, np.uint8))
        self._tokens: IndexedWriter | None = None
        if table is not None:
            writer = IndexedWriter(paths.token_prefix, token_dtype(table.vocab_size))
            self._tokens = self._stack.enter_context(writer)
        self._mask: IndexedWriter | None = None
        if loss_mask:
            self._mask = self._stack.enter_context(IndexedWriter(paths.mask_prefix, np.int32))

    def __enter__(self) -> DatasetWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)
        if kind is not None:
            for path in (self.paths.manifest, self.paths.token_table):
                partial_path(path).unlink(missing_ok=True)

    @contextmanager
    def _named(self) -> Iterator[None]:
        """An error of the disk says which data set it was about."""
        try:
            yield
        except OSError as error:
            if error.filename is None:
                raise OSError(error.errno, f"{error.strerror} while writing", self.paths.stem) from error
            raise

    def add(self, encoded: EncodedDocuments, *, events: int) -> None:
        """Appends documents whose token items hold ``events`` ids that are no text."""
        with self._named():
            self._add(encoded, events)

    def _add(self, encoded: EncodedDocuments, events: int) -> None:
        count = int(encoded.byte_lengths.size)
        self._bytes.add_many(encoded.byte_ids, encoded.byte_lengths)
        if self._tokens is not None:
            self._tokens.add_many(encoded.tokens, encoded.token_lengths)
            self.tokens += int(encoded.tokens.size) - events * count
        if self._mask is not None:
            self._mask.add_many(encoded.spans, encoded.span_lengths)
            self.marked += marked_count(encoded.spans)
        self.documents += count
        self.bytes += int(encoded.byte_ids.size) - count
        self.normalized += encoded.normalized
        self.skipped.update(encoded.skipped)

    def extend(self, paths: StoredPaths, manifest: Manifest) -> None:
        """Appends a whole data set; ValueError where its files are damaged."""
        for writer, prefix in (
            (self._bytes, paths.byte_prefix),
            (self._tokens, paths.token_prefix),
            (self._mask, paths.mask_prefix),
        ):
            if writer is None:
                continue
            reader = IndexedReader(prefix)
            reader.verify()
            if len(reader) != manifest.documents:
                raise ValueError(
                    f"{reader.idx_path}: {len(reader)} documents, {paths.manifest} says {manifest.documents}: files of "
                    "different runs, preprocess this partition again"
                )
            writer.extend(reader)
        self.documents += manifest.documents
        self.bytes += manifest.bytes
        self.tokens += manifest.tokens
        self.marked += manifest.marked
        self.normalized += manifest.normalized_documents
        self.skipped.update(Skipped(Counter(manifest.skipped), manifest.skipped_at))

    def finish(self, origin: Origin) -> None:
        """Writes everything that is not there yet, still under partial names."""
        with self._named():
            self._finish(origin)

    def _finish(self, origin: Origin) -> None:
        self._bytes.finish()
        if self._tokens is not None and self._table is not None:
            self._tokens.finish()
            write_and_sync(partial_path(self.paths.token_table), self._table.to_bytes())
        if self._mask is not None:
            self._mask.finish()
        manifest = Manifest(
            tokenizer_hash=NO_TOKENIZER if self._table is None else self._table.hash,
            vocab_size=0 if self._table is None else self._table.vocab_size,
            documents=self.documents,
            bytes=self.bytes,
            tokens=self.tokens,
            normalized_documents=self.normalized,
            # sorted: the order of reasons must not depend on how the corpus was cut
            skipped=dict(sorted(self.skipped.counts.items())),
            skipped_at=dict(sorted(self.skipped.places.items())),
            inputs=tuple(dict(entry) for entry in origin.inputs),
            tokenizer=origin.tokenizer,
            versions=dict(origin.versions),
            append_eod=origin.append_eod,
            loss_mask=self._mask is not None,
            marked=self.marked,
            settings=dict(origin.settings),
            partition=origin.partition,
        )
        write_and_sync(partial_path(self.paths.manifest), manifest.to_json().encode())

    def publish(self) -> None:
        """Final names for all. An old data set under the same name first loses the index that makes it readable."""
        Path(f"{self.paths.byte_prefix}.idx").unlink(missing_ok=True)
        if self._tokens is not None:
            self._tokens.publish()
            publish(self.paths.token_table)
        for ending in (".idx", ".bin"):
            Path(f"{self.paths.mask_prefix}{ending}").unlink(missing_ok=True)
        if self._mask is not None:
            self._mask.publish()
        publish(self.paths.manifest)
        self._bytes.publish()


def is_complete(paths: StoredPaths) -> bool:
    """Whether a data set of this name was published: its byte index comes last."""
    return Path(f"{paths.byte_prefix}.idx").exists() and paths.manifest.exists()


def remove_dataset(paths: StoredPaths) -> None:
    """Removes a data set's files, the one that makes it readable first."""
    for path in (
        *(Path(f"{paths.byte_prefix}{ending}") for ending in (".idx", ".bin")),
        *(Path(f"{paths.token_prefix}{ending}") for ending in (".idx", ".bin")),
        *(Path(f"{paths.mask_prefix}{ending}") for ending in (".idx", ".bin")),
        paths.manifest,
        paths.token_table,
    ):
        path.unlink(missing_ok=True)
