"""Text files in, a data set of bytes and teacher tokens out: reading, a pool of workers, atomic files, a manifest."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import multiprocessing
import multiprocessing.connection
import os
import platform
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megabyte_distill import __version__
from megabyte_distill.data.dataset_writer import DatasetWriter, Origin, is_complete, remove_dataset
from megabyte_distill.data.encoding import (
    EncodedBatch,
    EncodeJob,
    encode_batch,
    load_tokenizer,
    take_tokenizer,
    tokenizer_of,
)
from megabyte_distill.data.file_lock import only_process
from megabyte_distill.data.inputs import InputFile, InputFormat, TextDocuments, find_inputs
from megabyte_distill.data.manifest import NO_TOKENIZER, Manifest, StoredPaths
from megabyte_distill.data.merge import merge_partitions
from megabyte_distill.data.partitions import all_parts, assign, part_prefix
from megabyte_distill.data.preprocess_summary import PreprocessSummary
from megabyte_distill.data.progress import Progress, ProgressLines
from megabyte_distill.data.read_ahead import read_ahead
from megabyte_distill.data.readers import RawBatch, ReadProgress, read_batches
from megabyte_distill.data.skipped import Skipped
from megabyte_distill.data.tokenizers import DocumentTokenizer, TokenizerKind

_LIBRARIES = ("numpy", "tokenizers", "sentencepiece", "tiktoken", "orjson", "pyarrow", "zstandard")
_BATCHES_IN_FLIGHT = 3
"""A worker: enough to keep it busy, few enough to keep memory flat."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PreprocessOptions:
    """How to preprocess, beside what: see the flags of tools/preprocess_bytes.py."""

    input_format: InputFormat = InputFormat.AUTO
    text_documents: TextDocuments = TextDocuments.FILE
    workers: int = 1
    partitions: int = 1
    partition_index: int | None = None
    """Write this partition alone and merge nothing."""
    resume: bool = False
    """Leave finished partitions as they are."""
    overwrite: bool = False
    log_interval: int = 1000
    """Documents between progress lines."""
    report: Callable[[str], None] = lambda line: None
    """Takes progress lines and remarks."""
    progress: Callable[[int | None], Progress] | None = None
    """Makes the progress display for so many input bytes, in place of progress lines."""


_DEFAULTS = PreprocessOptions()


def preprocess(
    inputs: Sequence[str | Path],
    *,
    output_prefix: str | Path,
    job: EncodeJob,
    options: PreprocessOptions = _DEFAULTS,
) -> PreprocessSummary:
    """Writes PREFIX_{key}_document and its companions for every key; documents keep the order of the input.

    Every document is verified: its tokens' bytes are its bytes. With several workers the caller's main module needs a
    main guard. ValueError for bad input, with file and line; then no output file has its final name.
    """
    started = time.monotonic()
    _check_counts(job, options)
    files = find_inputs(
        inputs,
        input_format=options.input_format,
        text_documents=options.text_documents,
        leave_out=str(output_prefix),
    )
    _check_files(files, job, options)
    encoder = load_tokenizer(job).encoder if job.has_tokens else "none: bytes only"
    options.report(f"tokenizer: {encoder}")
    run = _Run(job=job, options=options, prefix=str(output_prefix), corpus=_corpus_hash(files))
    if options.partitions == 1 and options.partition_index is None:
        run.part(files, run.prefix, None)
        stored = run.paths(run.prefix)
    else:
        stored = run.partitioned(assign(files, options.partitions))
    by_key = dict(zip(job.json_keys, stored, strict=True))
    return PreprocessSummary.of(by_key, seconds=time.monotonic() - started)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Run:
    """One call of :func:`preprocess`."""

    job: EncodeJob
    options: PreprocessOptions
    prefix: str
    corpus: str
    """Hash of the whole list of inputs, of which a partition has a part."""

    def paths(self, prefix: str) -> list[StoredPaths]:
        return [StoredPaths.of(prefix, key) for key in self.job.json_keys]

    def settings(self, key: str) -> dict[str, Any]:
        """What decides the content of a data set beside inputs and tokenizer."""
        return {
            "key": key,
            "input_format": self.options.input_format.value,
            "text_documents": self.options.text_documents.value,
            "on_invalid": self.job.on_invalid.value,
            "strict": self.job.strict,
            "corpus": self.corpus,
            # not for plain text, whose manifests have no such entry
            **({} if self.job.chat_template is None else {"chat_template": self.job.chat_template.identity}),
            "tokenizer": tokenizer_of(self.job).segmentation_hash if self.job.has_tokens else NO_TOKENIZER,
        }

    def partitioned(self, shares: Sequence[Sequence[InputFile]]) -> list[StoredPaths]:
        """One partition, or all of them and the merge; returns what was written."""
        count, only = len(shares), self.options.partition_index
        if only is None and self._is_finished(self.prefix, [file for share in shares for file in share]):
            self._say_finished(self.prefix)
            return self.paths(self.prefix)
        if self.options.overwrite and only is None:
            self._remove_all()
        wanted = range(count) if only is None else [only]
        for index in wanted:  # one that does not fit is found before any is written
            self._is_finished(part_prefix(self.prefix, index, count), shares[index])
        for index in wanted:
            self.part(shares[index], part_prefix(self.prefix, index, count), (index, count))
        if only is not None:
            return self.paths(part_prefix(self.prefix, only, count))
        return merge_partitions(self.prefix, self.job.json_keys, count=count, overwrite=self.options.overwrite)

    def _remove_all(self) -> None:
        """An interrupted replacement must not leave anything old that a later --resume would take for its own."""
        for key, paths in zip(self.job.json_keys, self.paths(self.prefix), strict=True):
            for stored in (paths, *all_parts(self.prefix, key)):
                remove_dataset(stored)

    def part(self, files: Sequence[InputFile], prefix: str, partition: tuple[int, int] | None) -> None:
        """Preprocess some files into data sets of their own, unless that is done."""
        lock = Path(f"{prefix}.lock")
        with only_process(lock, lambda holder: f"process {holder} is writing {prefix}; give another --output-prefix"):
            if not self._is_finished(prefix, files):
                self._write(files, prefix, partition)
                return
        self._say_finished(prefix)

    def _say_finished(self, prefix: str) -> None:
        self.options.report(f"{prefix}: finished before, left as it is")

    def _is_finished(self, prefix: str, files: Sequence[InputFile]) -> bool:
        """True where --resume finds these data sets finished. ValueError where others lie there."""
        there = [paths for paths in self.paths(prefix) if Path(f"{paths.byte_prefix}.idx").exists()]
        if not there or self.options.overwrite:
            return False
        if not self.options.resume:
            raise ValueError(
                f"{there[0].byte_prefix}.idx exists; choose another --output-prefix, pass --resume to go on, or "
                "--overwrite"
            )
        if len(there) < len(self.job.json_keys) or not all(is_complete(paths) for paths in there):
            return False
        for key, paths in zip(self.job.json_keys, there, strict=True):
            self._check_same(Manifest.load(paths.manifest), key, paths, files)
        return True

    def _check_same(self, manifest: Manifest, key: str, paths: StoredPaths, files: Sequence[InputFile]) -> None:
        """ValueError where a finished data set is not what this run would write."""
        written = paths.manifest.stat().st_mtime_ns
        newer = [file.path for file in files if Path(file.path).stat().st_mtime_ns > written]
        found = [(entry.get("path"), entry.get("bytes")) for entry in manifest.inputs]
        if (
            newer
            or found != [(file.path, file.size()) for file in files]
            or manifest.settings != self.settings(key)
            or manifest.append_eod != self.job.append_eod
            or manifest.versions != _versions()
        ):
            why = f"{newer[0]} was changed since" if newer else "from other inputs, settings or library versions"
            raise ValueError(
                f"{paths.manifest}: finished, but {why}; pass --overwrite to replace it, or choose another "
                "--output-prefix"
            )

    def _write(self, files: Sequence[InputFile], prefix: str, partition: tuple[int, int] | None) -> None:
        job, options = self.job, self.options
        tokenizer = tokenizer_of(job) if job.has_tokens else None
        table = None if tokenizer is None else tokenizer.token_bytes
        sizes = [file.size() for file in files]
        total = None if None in sizes else sum(size for size in sizes if size is not None)
        read, skipped = ReadProgress(), Skipped()
        shown = (options.progress or self._lines)(total)
        with ExitStack() as stack:
            stack.callback(shown.close)
            masked = job.chat_template is not None
            made = (DatasetWriter(paths, table, loss_mask=masked) for paths in self.paths(prefix))
            writers = [stack.enter_context(writer) for writer in made]
            may_wait = any(file.may_wait for file in files)
            batches = read_ahead(read_batches(files, job.json_keys, read), RawBatch.size, may_wait=may_wait)
            stack.enter_context(closing(batches))
            for encoded in _encode_all(job, batches, options.workers):
                for writer, items in zip(writers, encoded.by_key, strict=True):
                    writer.add(items, events=1 + int(job.append_eod))
                skipped.update(encoded.skipped)
                documents, content = sum(w.documents for w in writers), sum(w.bytes for w in writers)
                shown.update(documents=documents, content=content, read=read.raw_bytes)
            for key, writer in zip(job.json_keys, writers, strict=True):
                writer.skipped.update(skipped)
                writer.finish(
                    Origin(
                        inputs=read.finished,
                        tokenizer="none" if tokenizer is None else f"{tokenizer.kind.value} {tokenizer.path}",
                        settings=self.settings(key),
                        versions=_versions(),
                        append_eod=job.append_eod,
                        partition=partition,
                    )
                )
            for writer in writers:
                writer.publish()

    def _lines(self, total: int | None) -> Progress:
        return ProgressLines(total, self.options.log_interval, self.options.report)


def _check_counts(job: EncodeJob, options: PreprocessOptions) -> None:
    """ValueError with all that is wrong with numbers and combinations."""
    problems = [
        f"{flag} {value}: expected at least 1"
        for flag, value in (
            ("--workers", options.workers),
            ("--log-interval", options.log_interval),
            ("--partitions", options.partitions),
        )
        if value < 1
    ]
    keys = job.json_keys
    if not keys or len(set(keys)) != len(keys):
        problems.append(f"--json-keys {' '.join(keys)}: expected different keys, at least one")
    index = options.partition_index
    if index is not None and not 0 <= index < options.partitions:
        problems.append(f"--partition-index {index}: expected 0 … {options.partitions - 1}, below --partitions")
    if options.resume and options.overwrite:
        problems.append("--resume and --overwrite contradict each other: leave one out")
    if job.has_tokens and not job.tokenizer_model:
        problems.append("--tokenizer-model is missing; --tokenizer-type none stores bytes alone")
    if not job.has_tokens and job.append_eod:
        problems.append("--append-eod ends token items; --tokenizer-type none writes none: leave one out")
    unused = {
        "--tokenizer-model": job.tokenizer_model,
        "--tiktoken-pattern": job.tiktoken_pattern,
        "--end-of-text": job.end_of_text,
        "--bos": job.bos,
        "--strict": job.strict,
        "--chat-template": job.chat_template,
    }
    if not job.has_tokens:
        problems += [f"--tokenizer-type none does not look at {flag}: leave one out" for flag, v in unused.items() if v]
    if problems:
        raise ValueError("; ".join(problems))


def _check_files(files: Sequence[InputFile], job: EncodeJob, options: PreprocessOptions) -> None:
    for file in files:
        if job.chat_template is not None and file.format not in (InputFormat.JSONL, InputFormat.JSON):
            raise ValueError(
                f"{file.name}: --chat-template reads dialogues, objects with messages, from .jsonl or .json, not from "
                f"{file.format.value}; convert it first"
            )
        if not file.has_keys and len(job.json_keys) > 1:
            raise ValueError(f"{file.name}: plain text has no keys {' '.join(job.json_keys)}")
        if file.is_stdin and (options.partitions > 1 or options.resume):
            raise ValueError("standard input can be read once: --partitions and --resume need files")


def iterate_texts(inputs: Sequence[str | Path], json_key: str = "text") -> Iterator[str]:
    """The documents as they stand in the input files, in order, for instance to train a tokenizer on them.

    ValueError for bad input, as :func:`preprocess`.
    """
    job = EncodeJob(json_keys=(json_key,), tokenizer_kind=TokenizerKind.NONE)
    for batch in read_batches(find_inputs(inputs), job.json_keys, ReadProgress()):
        [stored] = encode_batch(job, batch).by_key
        ends = stored.byte_lengths.cumsum()
        for length, end in zip(stored.byte_lengths.tolist(), ends.tolist(), strict=True):
            yield stored.byte_ids[end - length + 1 : end].tobytes().decode()


def _encode_all(job: EncodeJob, batches: Iterator[RawBatch], workers: int) -> Iterator[EncodedBatch]:
    """Encoded batches in the order of the input; in this thread for one worker.

    Workers are threads for bytes alone, which are copied faster than they reach another process.
    """
    if workers == 1:
        for batch in batches:
            yield encode_batch(job, batch)
        return
    pool: Executor
    if job.has_tokens:
        # A forked child of a process with threads (torch, tokenizers) may hang, hence spawn.
        context = multiprocessing.get_context("spawn")
        start = (job, tokenizer_of(job))
        pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=start)
    else:
        pool = ThreadPoolExecutor(workers, thread_name_prefix="encode")
    waiting: deque[Future[EncodedBatch]] = deque()
    try:
        for batch in batches:
            waiting.append(pool.submit(encode_batch, job, batch))
            if len(waiting) >= _BATCHES_IN_FLIGHT * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise ValueError(
            "a worker process was killed, perhaps for want of memory; nothing was written. Use fewer --workers, and "
            "look for a document of extraordinary size"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker(job: EncodeJob, tokenizer: DocumentTokenizer) -> None:
    """One thread a worker: the pool is the parallelism. It ends with its parent, however that ends."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, daemon=True).start()
    take_tokenizer(job, tokenizer)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _corpus_hash(files: Sequence[InputFile]) -> str:
    """sha256 in hex of the inputs' paths and sizes, in order: partitions must be cut from one list."""
    listed = [[file.path, file.size(), file.format.value] for file in files]
    return hashlib.sha256(json.dumps(listed).encode("utf-8", "surrogateescape")).hexdigest()


def _versions() -> dict[str, str]:
    """What may change a data set."""
    versions = {"megabyte-distill": __version__, "python": platform.python_version()}
    for library in _LIBRARIES:
        try:
            versions[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            versions[library] = "not installed"
    return versions
