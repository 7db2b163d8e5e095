"""Damaged files of a data set: every one is refused by a ValueError that names it, or read as if it were whole."""

from __future__ import annotations

import contextlib
import io
import json
import random
import resource
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from megabyte_distill.data.dataset import open_blend
from megabyte_distill.data.sampler import RowStream, evaluation_rows
from megabyte_distill.data.verify import verify_dataset

Files = dict[str, bytes]
"""Ending behind PREFIX_text → content."""
Mutation = Callable[[random.Random, Files, str], bytes]

TEXTS = [
    "",
    "a",
    "The house stood on the hill.",
    "日本語の文章です。",
    "👩‍👩‍👧‍👦 🙂",
    "\0",
    "wind, wind, wind " * 20,
    "café",
]
ENDINGS = (
    "_document.bin",
    "_document.idx",
    "_tokens.bin",
    "_tokens.idx",
    "_document.json",
    "_document.token_bytes.npz",
)
ROUNDS = 3000
SPARE_MEMORY = 1 << 29
"""Bytes a damaged file of a few kilobytes may make the reader ask for, and more."""
WILD = (0, 1, 2, -1, -2, 255, 2**15, 2**31 - 1, 2**31, -(2**31), 2**32, 2**40, 2**62, 2**63 - 1, -(2**63), 2**64 - 1)


def _flip(choose: random.Random, files: Files, ending: str) -> bytes:
    content = bytearray(files[ending])
    for _ in range(choose.choice((1, 1, 1, 2, 8))):
        content[choose.randrange(len(content))] ^= 1 << choose.randrange(8)
    return bytes(content)


def _cut(choose: random.Random, files: Files, ending: str) -> bytes:
    return files[ending][: choose.randrange(len(files[ending]))]


def _extend(choose: random.Random, files: Files, ending: str) -> bytes:
    return files[ending] + choose.randbytes(choose.choice((1, 2, 4, 8, 12, 20, 1000)))


def _another_file(choose: random.Random, files: Files, ending: str) -> bytes:
    return files[choose.choice([other for other in files if other != ending])]


def _remove_or_repeat_a_piece(choose: random.Random, files: Files, ending: str) -> bytes:
    content = files[ending]
    start, stop = sorted(choose.randrange(len(content) + 1) for _ in range(2))
    return content[:start] + content[start:stop] * choose.choice((0, 2)) + content[stop:]


def _wild_number(choose: random.Random, files: Files, ending: str) -> bytes:
    """A header field, a length or an offset of an index, or any place of another file, becomes an awkward number."""
    content = bytearray(files[ending])
    format, size = choose.choice((("<Q", 8), ("<I", 4), ("<B", 1)))
    place = choose.randrange(max(1, len(content) - size))
    if ending.endswith(".idx"):
        items = len(TEXTS)
        lengths, offsets = 34 + 4 * choose.randrange(items), 34 + 4 * items + 8 * choose.randrange(items)
        place, format = choose.choice(
            ((9, "<Q"), (17, "<B"), (18, "<Q"), (26, "<Q"), (lengths, "<I"), (lengths, "<I"), (offsets, "<Q"))
        )
    number = choose.choice((*WILD, choose.randrange(300), 18 + choose.randrange(20)))
    struct.pack_into(format, content, place, number % (1 << 8 * struct.calcsize(format)))
    return bytes(content)


def _json_value(choose: random.Random, files: Files, ending: str) -> bytes:
    manifest = json.loads(files["_document.json"])
    name = choose.choice(list(manifest))
    nothing = object()
    values = (nothing, None, True, -1, 0, 3.5, 1e999, 10**25, 10**400, "", "x", "\ud800", [], [1], [[]], {}, {"a": [1]})
    value = choose.choice(values)
    if value is nothing:
        del manifest[name]
    else:
        manifest[name] = value
    return json.dumps(manifest).encode()


def _json_text(choose: random.Random, files: Files, ending: str) -> bytes:
    whole = files["_document.json"]
    broken = (b"", b"[" * 100_000, b'{"a":' * 5000, b"\xff\xfe", b"\xef\xbb\xbf" + whole, b"1" * 5000, b"NaN", b"null")
    return choose.choice((*broken, b"[]", b'""', whole.replace(b"1", b"1" * 5000), whole.replace(b'"', b"'")))


def _npz(choose: random.Random, files: Files, ending: str) -> bytes:
    """A sound archive (right check sums) of arrays that are not a token table's."""
    arrays = dict(np.load(io.BytesIO(files["_document.token_bytes.npz"])))
    members = {}
    for name, array in arrays.items():
        stream = io.BytesIO()
        np.save(stream, array)
        members[name] = stream.getvalue()
    name = choose.choice(list(arrays))
    array, size = arrays[name], arrays[name].size
    kinds: tuple[Callable[[], object], ...] = (
        lambda: array.astype(choose.choice((np.float64, np.int32, np.uint64, np.complex128, ">i8", "S3"))),
        lambda: np.repeat(array.reshape(-1), choose.choice((0, 2))),
        lambda: array.reshape(1, *array.shape),
        lambda: np.full_like(array, np.array(choose.choice(WILD)).astype(array.dtype)),
        lambda: array[..., ::-1] if array.ndim else array + 1,
        lambda: None,
    )
    changed = choose.choice(kinds)()
    if changed is None:
        header = choose.choice((b"(%d,)" % 10**12, b"(-1,)", b"(2,)", b"((1,),)", b"(" * 60, b"(True,)"))
        old = f"({size},)".encode() if array.ndim else b"()"
        members[name] = members[name].replace(old, header, 1)
    else:
        stream = io.BytesIO()
        np.save(stream, changed, allow_pickle=False)
        members[name] = stream.getvalue()
    if choose.random() < 0.1:
        del members[name]
    return _archive(members, choose.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA)))


def _archive(members: dict[str, bytes], compression: int) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return stream.getvalue()


MUTATIONS: tuple[tuple[Mutation, tuple[str, ...]], ...] = (
    (_flip, ENDINGS),
    (_flip, ENDINGS),
    (_cut, ENDINGS),
    (_extend, ENDINGS),
    (_another_file, ENDINGS),
    (_remove_or_repeat_a_piece, ENDINGS),
    (_wild_number, ("_document.idx", "_tokens.idx")),
    (_wild_number, ("_document.idx", "_tokens.idx")),
    (_wild_number, ENDINGS),
    (_json_value, ("_document.json",)),
    (_json_text, ("_document.json",)),
    (_npz, ("_document.token_bytes.npz",)),
)


@contextlib.contextmanager
def _little_memory() -> Iterator[None]:
    """Address space enough for small files; a huge request is then a MemoryError. Where it is not known, no limit."""
    status = Path("/proc/self/statm")
    if not status.exists():
        yield
        return
    used = int(status.read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + SPARE_MEMORY, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _read(stem: str) -> tuple[list[bytes], list[list[int]]]:
    """Everything a run reads: every document, the training rows of more than an epoch, the held-out rows."""
    [dataset], weights = open_blend([stem])
    documents = [dataset[index].byte_ids.tobytes() for index in dataset.documents]
    stream = RowStream([dataset], weights, row_bytes=64, chunk_bucket=8, seed=1)
    rows = [stream.materialize(plan) for plan in stream.next_rows(16)]
    rows += evaluation_rows(dataset, row_bytes=64, chunk_bucket=8)
    return documents, [[*row.byte_ids.tolist(), *row.labels.tolist(), *row.token_labels.tolist()] for row in rows]


def _replace(path: str, content: bytes) -> None:
    """A new file in the old one's place: overwriting waits for the disk on some file systems."""
    Path(path).unlink()
    Path(path).write_bytes(content)


@pytest.mark.timeout(120)
def test_a_damaged_file_is_refused_by_name_or_read_rightly(store: Callable[..., str]) -> None:
    stem = store(TEXTS)
    prefix = stem.removesuffix("_document")
    files = {ending: Path(prefix + ending).read_bytes() for ending in ENDINGS}
    whole = _read(stem)
    choose = random.Random(0)
    refused = 0
    with _little_memory(), warnings.catch_warnings():
        warnings.simplefilter("error")
        for number in range(ROUNDS):
            mutation, endings = choose.choice(MUTATIONS)
            ending = choose.choice(endings)
            damaged = mutation(choose, files, ending)
            _replace(prefix + ending, damaged)
            try:
                assert _read(stem) == whole
            except ValueError as error:
                assert prefix in str(error), f"round {number}, {mutation.__name__} of {ending}: {error}"
                refused += 1
            except BaseException as error:
                error.add_note(f"round {number}, {mutation.__name__} of {ending}")
                raise
            try:
                verify_dataset(stem)
            except ValueError as error:
                assert prefix in str(error), f"round {number}, verify, {mutation.__name__} of {ending}: {error}"
            except BaseException as error:
                error.add_note(f"round {number}, verify, {mutation.__name__} of {ending}")
                raise
            _replace(prefix + ending, files[ending])
    assert ROUNDS // 2 < refused < ROUNDS, "most damage is noticed, some (a library's version) is none"
    assert _read(stem) == whole


def test_an_archive_that_inflates_beyond_any_table_is_refused(store: Callable[..., str]) -> None:
    path = Path(store(TEXTS) + ".token_bytes.npz")
    with zipfile.ZipFile(path) as archive:
        members = {name.removesuffix(".npy"): archive.read(name) for name in archive.namelist()}
    path.write_bytes(_archive(members | {"blob": bytes((1 << 26) + 1)}, zipfile.ZIP_DEFLATED))
    with _little_memory(), pytest.raises(ValueError, match=rf"{path.name}.*expected at most"):
        open_blend([str(path).removesuffix(".token_bytes.npz")])


def test_an_archive_that_claims_more_than_it_holds_is_refused(store: Callable[..., str]) -> None:
    path = Path(store(TEXTS) + ".token_bytes.npz")
    content = bytearray(path.read_bytes())
    struct.pack_into("<I", content, content.index(b"PK\1\2") + 20, 2**31 - 1)  # compressed size of the first array
    path.write_bytes(content)
    with _little_memory(), pytest.raises(ValueError, match=rf"{path.name}.*of {2**31 - 1} bytes, expected at most"):
        open_blend([str(path).removesuffix(".token_bytes.npz")])
