#!/usr/bin/env python3
"""What it costs to open a large data set: a hundred million documents against a thousand.

    python benchmarks/open_dataset.py                       # 100 million documents; writes about 4 GB, removed after
    python benchmarks/open_dataset.py --quick               # one million: shows that it runs
    python benchmarks/open_dataset.py --folder /scratch     # where the temporary files lie

The data set is synthetic: documents of constant length, real index files, and .bin files that are holes (zeros), so
that only the indexes take room. Its pages are dropped from the page cache before each measurement, so that reading
them counts. Opening and the first row are measured in a fresh process, after its imports; the growth of its peak
resident memory is set against that of a process that opens the small set. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402 - after the path is set

from megabyte_distill.data.dataset import ByteTokenDataset  # noqa: E402
from megabyte_distill.data.manifest import Manifest, StoredPaths  # noqa: E402
from megabyte_distill.data.sampler import RowStream  # noqa: E402
from megabyte_distill.data.token_bytes import TokenBytes  # noqa: E402

DOCUMENTS = 100_000_000
QUICK_DOCUMENTS = 1_000_000
FEW_DOCUMENTS = 1000
VOCAB_SIZE = 128_256
"""As large as Llama 3's: the table is part of what is opened."""
TOKENS = 64
"""Tokens and bytes of a document: token 0 is the byte 0, which is what a hole in a file reads as."""
ROW_BYTES, ROWS = 8192, 100
BLOCK = 1 << 20
UNIT = {"Linux": 1024, "Darwin": 1}
"""Bytes in which getrusage counts memory."""


def write_dataset(folder: Path, documents: int) -> str:
    """Files of ``documents`` equal documents; returns their stem."""
    folder.mkdir()
    paths = StoredPaths.of(folder / "many", "text")
    words = [b"\0", None, *(b"%x" % number for number in range(VOCAB_SIZE - 2))]
    table = TokenBytes.from_list(words, end_of_text_id=1, bos_id=None)
    table.save(paths.token_table)
    for prefix, dtype, code in (
        (paths.byte_prefix, np.dtype(np.uint8), 1),
        (paths.token_prefix, np.dtype(np.int32), 4),
    ):
        size = (TOKENS + 1) * dtype.itemsize
        with open(f"{prefix}.bin", "wb") as stream:
            stream.truncate(documents * size)
        with open(f"{prefix}.idx", "wb") as stream:
            write_index(stream, documents, code=code, size=size)
    manifest = Manifest(
        tokenizer_hash=table.hash,
        vocab_size=VOCAB_SIZE,
        documents=documents,
        bytes=documents * TOKENS,
        tokens=documents * TOKENS,
        inputs=({"path": "none", "sha256": hashlib.sha256(b"").hexdigest()},),
    )
    paths.manifest.write_text(manifest.to_json(), encoding="utf-8")
    return paths.stem


def write_index(stream: Any, documents: int, *, code: int, size: int) -> None:
    """An index (layout: data/formats.py) of items of TOKENS + 1 elements, ``size`` bytes; block by block."""
    stream.write(struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, code, documents, documents + 1))
    lengths = np.full(BLOCK, TOKENS + 1, dtype=np.int32)
    for start in range(0, documents, BLOCK):
        stream.write(lengths[: documents - start].data)
    for step, count in ((size, documents), (1, documents + 1)):  # offsets, then the document index
        for start in range(0, count, BLOCK):
            stream.write((np.arange(start, min(start + BLOCK, count), dtype=np.int64) * step).data)


def forget_pages(stem: str) -> None:
    """Drops the files from the page cache, where the system can."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path in Path(stem).parent.iterdir():
        with open(path, "rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def peak_bytes() -> int:
    """Largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * UNIT.get(os.uname().sysname, 1024)


def resident_bytes() -> int:
    """Resident memory of this process now; its peak so far where the system does not say."""
    status = Path("/proc/self/statm")
    if not status.exists():
        return peak_bytes()
    return int(status.read_text().split()[1]) * resource.getpagesize()


def measure(stem: str) -> dict[str, float]:
    """Opens a data set and takes rows from it: seconds and bytes of memory."""
    before = resident_bytes()
    start = time.perf_counter()
    dataset = ByteTokenDataset(stem)
    opened = time.perf_counter()
    stream = RowStream([dataset], row_bytes=ROW_BYTES, chunk_bucket=128, seed=1)
    [plan] = stream.next_rows(1)
    stream.materialize(plan)
    first = time.perf_counter()
    for plan in stream.next_rows(ROWS):
        stream.materialize(plan)
    rows = time.perf_counter()
    return {
        "open_seconds": opened - start,
        "first_row_seconds": first - opened,
        "rows_per_second": ROWS / (rows - first),
        "growth_bytes": peak_bytes() - before,
    }


def measure_in_fresh_process(stem: str) -> dict[str, float]:
    forget_pages(stem)
    command = [sys.executable, str(Path(__file__).resolve()), "--measure", stem]
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(found, dict)
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--documents", type=int, default=None, help=f"documents of the large set (default {DOCUMENTS})")
    add("--quick", action="store_true", help=f"{QUICK_DOCUMENTS} documents instead")
    add("--folder", default=None, metavar="DIR", help="where the temporary files lie (default: the system's place)")
    add("--measure", default=None, metavar="STEM", help="only open this data set and print what it cost")
    arguments = parser.parse_args(argv)
    if arguments.measure is not None:
        print(json.dumps(measure(arguments.measure)))
        return 0
    documents = arguments.documents or (QUICK_DOCUMENTS if arguments.quick else DOCUMENTS)
    with tempfile.TemporaryDirectory(prefix="open_dataset_", dir=arguments.folder) as folder:
        few = write_dataset(Path(folder) / "few", FEW_DOCUMENTS)
        start = time.perf_counter()
        many = write_dataset(Path(folder) / "many", documents)
        print(f"wrote an index of {documents:,} documents in {time.perf_counter() - start:.1f} s", flush=True)
        baseline, found = measure_in_fresh_process(few), measure_in_fresh_process(many)
    for name, cost in ((f"{FEW_DOCUMENTS:,} documents", baseline), (f"{documents:,} documents", found)):
        print(f"{name}: " + ", ".join(f"{key} {value:.6g}" for key, value in cost.items()))
    result = {
        "documents": documents,
        "open_seconds": found["open_seconds"],
        "first_row_seconds": found["first_row_seconds"],
        "rows_per_second": found["rows_per_second"],
        "peak_rss_growth_bytes": found["growth_bytes"] - baseline["growth_bytes"],
        "open_seconds_of_few": baseline["open_seconds"],
    }
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
