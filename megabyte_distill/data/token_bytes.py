"""The table of a teacher's vocabulary: which bytes each token stands for."""

from __future__ import annotations

import hashlib
import io
import zipfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megabyte_distill.data.formats import partial_path, publish, write_and_sync

_SCHEMA = 1


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
        final = Path(path)
        write_and_sync(partial_path(final), self.to_bytes())
        publish(final)

    @classmethod
    def load(cls, path: str | Path) -> TokenBytes:
        """Reads what :meth:`save` wrote (no pickle); ValueError where the file is missing or damaged."""
        try:
            with np.load(path, allow_pickle=False) as arrays:
                schema = int(arrays["schema"])
                table = cls(
                    blob=arrays["blob"],
                    offsets=arrays["offsets"],
                    end_of_text_id=int(arrays["end_of_text_id"]),
                    bos_id=None if int(arrays["bos_id"]) < 0 else int(arrays["bos_id"]),
                )
        except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path}: not a readable token table ({error}); preprocess again") from error
        if schema != _SCHEMA:
            raise ValueError(f"{path}: token table version {schema}, expected {_SCHEMA}; preprocess again")
        offsets = table.offsets
        if offsets.ndim != 1 or offsets.size < 2 or offsets[0] != 0 or np.any(np.diff(offsets) < 0):
            raise ValueError(f"{path}: damaged token table (offsets do not ascend from 0); preprocess again")
        if offsets[-1] != table.blob.size or not 0 <= table.end_of_text_id < table.vocab_size:
            raise ValueError(f"{path}: damaged token table ({table.blob.size} bytes, {offsets[-1]} expected)")
        return table
