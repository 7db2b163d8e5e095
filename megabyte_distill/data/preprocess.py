"""Text files in, a data set of bytes and teacher tokens out: reading, a pool of workers, atomic files, a manifest."""

from __future__ import annotations

import importlib.metadata
import multiprocessing
import os
import platform
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megabyte_distill import __version__
from megabyte_distill.data.encoding import (
    EncodedBatch,
    EncodedDocuments,
    EncodeJob,
    encode_batch,
    record_texts,
    token_dtype,
    tokenizer_of,
)
from megabyte_distill.data.formats import IndexedWriter, partial_path, publish, write_and_sync
from megabyte_distill.data.inputs import InputFormat, RawBatch, expand_inputs, input_format, read_batches
from megabyte_distill.data.manifest import Manifest, StoredPaths
from megabyte_distill.data.token_bytes import TokenBytes
from megabyte_distill.data.tokenizers import DocumentTokenizer, TokenizerKind

_LIBRARIES = ("numpy", "tokenizers", "sentencepiece", "tiktoken")
_BATCHES_IN_FLIGHT = 3
"""A worker: enough to keep it busy, few enough to keep memory flat."""


@dataclass(slots=True)
class PreprocessSummary:
    """What a run did; counts are over all keys."""

    documents: int = 0
    bytes: int = 0
    """Without BOS."""
    tokens: int = 0
    """Without start ids."""
    normalized_documents: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    stems: dict[str, str] = field(default_factory=dict)
    """JSON key → the stem that ``--data-path`` takes."""

    def __str__(self) -> str:
        skipped = ", ".join(f"{count} {reason}" for reason, count in sorted(self.skipped.items())) or "none"
        lines = [
            f"documents {self.documents}, bytes {self.bytes}, tokens {self.tokens}, "
            f"bytes per token {self.bytes / max(1, self.tokens):.3f}",
            f"changed by normalisation {self.normalized_documents}, skipped: {skipped}, {self.seconds:.1f} s",
            *(f"--data-path {stem}" for stem in self.stems.values()),
        ]
        return "\n".join(lines)


class _KeyWriter:
    """The files of one JSON key, which appear together, the byte index last."""

    def __init__(self, paths: StoredPaths, table: TokenBytes, stack: ExitStack) -> None:
        self.paths, self._table = paths, table
        paths.byte_prefix.parent.mkdir(parents=True, exist_ok=True)
        self._bytes = stack.enter_context(IndexedWriter(paths.byte_prefix, np.uint8))
        self._tokens = stack.enter_context(IndexedWriter(paths.token_prefix, token_dtype(table.vocab_size)))
        self.documents = self.bytes = self.tokens = self.normalized = 0

    def add(self, encoded: EncodedDocuments) -> None:
        self._bytes.add_many(encoded.byte_ids, encoded.byte_lengths)
        self._tokens.add_many(encoded.tokens, encoded.token_lengths)
        count = int(encoded.byte_lengths.size)
        self.documents += count
        self.bytes += int(encoded.byte_ids.size) - count
        self.tokens += int(encoded.tokens.size) - count
        self.normalized += encoded.normalized

    def finish(self, tokenizer: DocumentTokenizer, hashes: dict[str, str], skipped: Counter[str]) -> None:
        """Writes everything that is not there yet, still under partial names."""
        self._bytes.finish()
        self._tokens.finish()
        write_and_sync(partial_path(self.paths.token_table), self._table.to_bytes())
        manifest = Manifest(
            tokenizer_hash=self._table.hash,
            vocab_size=self._table.vocab_size,
            documents=self.documents,
            bytes=self.bytes,
            tokens=self.tokens,
            normalized_documents=self.normalized,
            skipped=dict(skipped),
            inputs=tuple({"path": path, "sha256": digest} for path, digest in hashes.items()),
            tokenizer=f"{tokenizer.kind.value} {tokenizer.path}",
            versions=_versions(),
        )
        write_and_sync(partial_path(self.paths.manifest), manifest.to_json().encode())

    def publish(self) -> None:
        """Final names for all. An old data set under the same name first loses the index that makes it readable."""
        Path(f"{self.paths.byte_prefix}.idx").unlink(missing_ok=True)
        self._tokens.publish()
        publish(self.paths.token_table)
        publish(self.paths.manifest)
        self._bytes.publish()


def preprocess(
    inputs: Sequence[str | Path],
    *,
    output_prefix: str | Path,
    tokenizer_model: str | Path,
    tokenizer_kind: TokenizerKind = TokenizerKind.AUTO,
    tiktoken_pattern: str | None = None,
    end_of_text: str | int | None = None,
    bos: str | int | None = None,
    json_keys: Sequence[str] = ("text",),
    workers: int = 1,
    log_interval: int = 1000,
    overwrite: bool = False,
    report: Callable[[str], None] = lambda line: None,
) -> PreprocessSummary:
    """Writes PREFIX_{key}_document and its companions for every key; documents keep the order of the input.

    Every document is verified: its tokens' bytes are its bytes. ``report`` gets a progress line every ``log_interval``
    documents. With several ``workers`` the caller's main module needs a main guard. ValueError for bad input, with
    file and line; then no output file exists.
    """
    started = time.monotonic()
    files = _checked_inputs(inputs, json_keys, workers=workers, log_interval=log_interval)
    paths = {key: StoredPaths.of(output_prefix, key) for key in json_keys}
    for stored in paths.values():
        if Path(f"{stored.byte_prefix}.idx").exists() and not overwrite:
            raise ValueError(f"{stored.byte_prefix}.idx exists; choose another --output-prefix or pass --overwrite")
    job = EncodeJob(
        json_keys=tuple(json_keys),
        tokenizer_model=str(tokenizer_model),
        tokenizer_kind=tokenizer_kind,
        tiktoken_pattern=tiktoken_pattern,
        end_of_text=end_of_text,
        bos=bos,
    )
    tokenizer_of.cache_clear()  # the files may have changed since an earlier call
    tokenizer = tokenizer_of(job)
    hashes: dict[str, str] = {}
    summary = PreprocessSummary(stems={key: stored.stem for key, stored in paths.items()})
    with ExitStack() as stack:
        writers = [_KeyWriter(stored, tokenizer.token_bytes, stack) for stored in paths.values()]
        batches = (batch for file in files for batch in read_batches(file, hashes))
        for encoded in _encode_all(job, batches, workers):
            before = summary.documents
            for writer, documents in zip(writers, encoded.by_key, strict=True):
                writer.add(documents)
            summary.skipped.update(encoded.skipped)
            summary.documents = sum(writer.documents for writer in writers)
            summary.bytes = sum(writer.bytes for writer in writers)
            summary.seconds = time.monotonic() - started
            if summary.documents // log_interval > before // log_interval:
                report(_progress(summary))
        for writer in writers:
            writer.finish(tokenizer, hashes, summary.skipped)
        for writer in writers:
            writer.publish()
    summary.tokens = sum(writer.tokens for writer in writers)
    summary.normalized_documents = sum(writer.normalized for writer in writers)
    summary.seconds = time.monotonic() - started
    return summary


def iterate_texts(inputs: Sequence[str | Path], json_key: str = "text") -> Iterator[str]:
    """The documents as they stand in the input files, in order, for instance to train a tokenizer on them.

    ValueError for bad input, as :func:`preprocess`.
    """
    for file in expand_inputs(inputs):
        for batch in read_batches(file, {}):
            for index, record in enumerate(batch.records):
                if batch.format is InputFormat.TEXT or record.strip():
                    yield record_texts(record, batch.format, (json_key,), batch.where(index))[0]


def _checked_inputs(
    inputs: Sequence[str | Path], json_keys: Sequence[str], *, workers: int, log_interval: int
) -> list[Path]:
    if workers < 1 or log_interval < 1:
        raise ValueError(f"--workers {workers} --log-interval {log_interval}: expected at least 1")
    if not json_keys or len(set(json_keys)) != len(json_keys):
        raise ValueError(f"--json-keys {' '.join(json_keys)}: expected different keys, at least one")
    files = expand_inputs(inputs)
    if len(json_keys) > 1:
        for file in files:
            if input_format(file) is InputFormat.TEXT:
                raise ValueError(f"{file}: a text file is one document and has no keys {' '.join(json_keys)}")
    return files


def _encode_all(job: EncodeJob, batches: Iterator[RawBatch], workers: int) -> Iterator[EncodedBatch]:
    """Encoded batches in the order of the input; in this process for one worker."""
    if workers == 1:
        for batch in batches:
            yield encode_batch(job, batch)
        return
    # A forked child of a process with threads (torch, tokenizers) may hang, hence spawn.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
    waiting: deque[Future[EncodedBatch]] = deque()
    try:
        for batch in batches:
            waiting.append(pool.submit(encode_batch, job, batch))
            if len(waiting) >= _BATCHES_IN_FLIGHT * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker() -> None:
    """One thread a worker: the pool is the parallelism."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _progress(summary: PreprocessSummary) -> str:
    seconds = max(summary.seconds, 1e-9)
    rate, speed = summary.documents / seconds, summary.bytes / seconds / 1e6
    return f"Processed {summary.documents} documents ({rate:.1f} docs/s, {speed:.2f} MB/s)."


def _versions() -> dict[str, str]:
    """What may change a data set."""
    versions = {"megabyte-distill": __version__, "python": platform.python_version()}
    for library in _LIBRARIES:
        try:
            versions[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            versions[library] = "not installed"
    return versions
