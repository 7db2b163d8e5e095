"""The table of a teacher's vocabulary: which bytes each token stands for."""

from __future__ import annotations

import hashlib
import io
import math
import re
import struct
import zipfile
import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megabyte_distill.files import write_whole

_SCHEMA = 1
_DAMAGE = (
    *(OSError, EOFError, ValueError, KeyError, struct.error),
    *(zipfile.BadZipFile, zlib.error, RuntimeError),  # the last where a password is asked for
)
"""What a damaged archive may raise."""
_MAX_ARRAY_BYTES = 1 << 26
"""Above any vocabulary: the offsets of eight million ids."""
_ARRAY_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '(?P<dtype>[^']{2,3})', 'fortran_order': (?:False|True), "
    rb"'shape': \((?P<shape>[0-9]{0,19},?)\), \} *\n",
    re.DOTALL,
)
"""What numpy writes before an array of one dimension or none."""


@dataclass(frozen=True, kw_only=True)
class TokenBytes:
    """Bytes of every token id in [0, W).

    A *special* id (control tokens, unknown, padding rows of the embedding table, ids the tokenizer leaves out) has no
    bytes: its length is 0, and it never stands for document text. Every other id has at least one byte.
    """

    blob: NDArray[np.uint8]
    """All tokens' bytes one after the other."""
    offsets: NDArray[np.int64]
    """[W + 1]; token i is ``blob[offsets[i] : offsets[i + 1]]``."""
    end_of_text_id: int
    """The teacher's token that ends a document."""
    bos_id: int | None
    """The teacher's BOS, None where the family has none."""

    @classmethod
    def from_list(cls, tokens: list[bytes | None], *, end_of_text_id: int, bos_id: int | None) -> TokenBytes:
        """Builds the table; None marks a special id. ValueError for an empty token or a special id that is none."""
        for index, token in enumerate(tokens):
            if token is not None and not token:
                raise ValueError(
                    f"token id {index} stands for zero bytes and is not special; boundaries would be ambiguous: "
                    "use a tokenizer without empty tokens"
                )
        for name, special in (("end of text", end_of_text_id), ("BOS", bos_id)):
            if special is not None and not 0 <= special < len(tokens):
                raise ValueError(f"{name} id {special} is outside the vocabulary of {len(tokens)} ids")
        # The ends of a document are events, not text, even where a tokenizer lists them as ordinary tokens.
        events = {end_of_text_id, bos_id}
        pieces = [b"" if token is None or index in events else token for index, token in enumerate(tokens)]
        lengths = np.fromiter((len(piece) for piece in pieces), dtype=np.int64, count=len(pieces))
        return cls(
            blob=np.frombuffer(b"".join(pieces), dtype=np.uint8),
            offsets=np.concatenate((np.zeros(1, dtype=np.int64), np.cumsum(lengths))),
            end_of_text_id=end_of_text_id,
            bos_id=bos_id,
        )

    @property
    def vocab_size(self) -> int:
        """W."""
        return int(self.offsets.size) - 1

    @property
    def start_id(self) -> int:
        """What the teacher reads where bytes read BOS: its BOS, or its end-of-text token where it has none."""
        return self.end_of_text_id if self.bos_id is None else self.bos_id

    @cached_property
    def lengths(self) -> NDArray[np.int32]:
        """[W] bytes of each token, 0 for special ids."""
        return np.diff(self.offsets).astype(np.int32)

    @property
    def special(self) -> NDArray[np.bool_]:
        """[W] True where the id never stands for text."""
        return np.equal(self.lengths, 0)

    def __getitem__(self, token: int) -> bytes:
        """The bytes of one token, b"" for a special id."""
        return self.blob[self.offsets[token] : self.offsets[token + 1]].tobytes()

    def concatenate(self, tokens: NDArray[Any]) -> NDArray[np.uint8]:
        """The bytes of a token sequence; ids must lie in [0, W), special ones add nothing."""
        ids = tokens.astype(np.int64, copy=False)
        lengths = self.lengths[ids].astype(np.int64)
        ends = np.cumsum(lengths)
        total = int(ends[-1]) if ends.size else 0
        source = np.repeat(self.offsets[ids] - (ends - lengths), lengths) + np.arange(total)
        return self.blob[source]

    @cached_property
    def duplicates(self) -> tuple[tuple[int, ...], ...]:
        """Groups of ids that stand for the same bytes, each ascending; only groups of two and more."""
        groups: dict[bytes, list[int]] = {}
        for index in np.flatnonzero(self.lengths).tolist():
            groups.setdefault(self[index], []).append(index)
        return tuple(tuple(group) for group in groups.values() if len(group) > 1)

    @cached_property
    def hash(self) -> str:
        """sha256 in hex of what the ids mean; special ids behind the last real one (padding of W) do not count."""
        last = int(np.flatnonzero(self.lengths)[-1]) + 1 if self.blob.size else 0
        digest = hashlib.sha256(b"megabyte-distill token bytes 1\0")
        digest.update(f"{self.end_of_text_id} {self.start_id} {last}\0".encode())
        digest.update(self.lengths[:last].astype("<i4").tobytes())
        digest.update(self.blob.tobytes())
        return digest.hexdigest()

    def padded(self, vocab_size: int) -> TokenBytes:
        """The same table with special ids appended up to ``vocab_size``; ValueError if that is below W."""
        if vocab_size < self.vocab_size:
            raise ValueError(f"the tokenizer has {self.vocab_size} ids, the model's vocabulary only {vocab_size}")
        tail = np.full(vocab_size - self.vocab_size, self.offsets[-1])
        return TokenBytes(
            blob=self.blob,
            offsets=np.concatenate((self.offsets, tail)),
            end_of_text_id=self.end_of_text_id,
            bos_id=self.bos_id,
        )

    def to_bytes(self) -> bytes:
        """The file's content: an .npz of plain arrays."""
        buffer = io.BytesIO()
        np.savez_compressed(
            buffer,
            schema=np.int64(_SCHEMA),
            blob=self.blob,
            offsets=self.offsets,
            end_of_text_id=np.int64(self.end_of_text_id),
            bos_id=np.int64(-1 if self.bos_id is None else self.bos_id),
        )
        return buffer.getvalue()

    def save(self, path: str | Path) -> None:
        """Writes the table as .npz; complete or absent."""
        write_whole(Path(path), self.to_bytes())

    @classmethod
    def load(cls, path: str | Path) -> TokenBytes:
        """Reads what :meth:`save` wrote (no pickle); ValueError where the file is missing or damaged."""
        try:
            with zipfile.ZipFile(path) as archive:
                schema, end_of_text_id, bos_id = (
                    int(_read_array(archive, name, np.int64, 0)) for name in ("schema", "end_of_text_id", "bos_id")
                )
                blob, offsets = _read_array(archive, "blob", np.uint8, 1), _read_array(archive, "offsets", np.int64, 1)
        except _DAMAGE as error:
            raise ValueError(f"{path}: not a readable token table ({error}); preprocess again") from error
        if schema != _SCHEMA:
            raise ValueError(f"{path}: token table version {schema}, expected {_SCHEMA}; preprocess again")
        if offsets.size < 2 or offsets[0] != 0 or np.any(offsets[1:] < offsets[:-1]):
            raise ValueError(f"{path}: damaged token table (offsets do not ascend from 0); preprocess again")
        if offsets[-1] != blob.size:
            raise ValueError(
                f"{path}: damaged token table ({blob.size} bytes, {offsets[-1]} expected); preprocess again"
            )
        table = cls(blob=blob, offsets=offsets, end_of_text_id=end_of_text_id, bos_id=None if bos_id < 0 else bos_id)
        if not (0 <= end_of_text_id < table.vocab_size and bos_id < table.vocab_size):
            raise ValueError(
                f"{path}: damaged token table (end of text {end_of_text_id} and BOS {bos_id} of {table.vocab_size} "
                "ids); preprocess again"
            )
        return table


def _read_array(archive: zipfile.ZipFile, name: str, dtype: type, ndim: int) -> NDArray[Any]:
    """One array of an .npz; ValueError where it is not what :meth:`TokenBytes.save` writes.

    numpy's own reader evaluates the array's header and believes its size; this one allocates what the file holds, up
    to a limit.
    """
    member = archive.getinfo(f"{name}.npy")
    claimed = max(member.file_size, member.compress_size)  # zipfile allocates what either says
    if claimed > _MAX_ARRAY_BYTES:
        raise ValueError(f"{name} of {claimed} bytes, expected at most {_MAX_ARRAY_BYTES}")
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{name} in compression {member.compress_type}, expected stored or deflated")
    content = archive.read(member)
    header = _ARRAY_HEADER.match(content)
    if header is None:
        raise ValueError(f"{name} begins with {content[:80]!r}, expected an array of {np.dtype(dtype)}")
    described = header["dtype"].decode(), *(int(size) for size in header["shape"].split(b",") if size.strip())
    shape = ((len(content) - header.end()) // np.dtype(dtype).itemsize,) * ndim
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if described != (np.dtype(dtype).str, *shape) or header.end() + size != len(content):
        raise ValueError(f"{name} is {described} in {len(content)} bytes, expected an array of {np.dtype(dtype)}")
    return np.frombuffer(content, dtype=dtype, offset=header.end()).reshape(shape)
