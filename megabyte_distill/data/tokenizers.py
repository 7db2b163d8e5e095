"""A teacher's tokenizer as document encoder: no special tokens, exact bytes for every id.

    tokenizer = load("path/to/teacher")
    document = tokenizer.normalize(text)
    [tokens] = tokenizer.encode_batch([document])
    tokenizer.token_bytes.concatenate(tokens).tobytes() == document.encode()

Text never becomes a special or added token: "<|endoftext|>" in a document is thirteen characters, "<tool_call>" eleven.
User-defined symbols of a SentencePiece vocabulary are no such tokens but text: Gemma's "<table>" is one token.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from megabyte_distill.data.token_bytes import TokenBytes
from megabyte_distill.data.tokenizer_ids import SpecialIds


class TokenizerKind(StrEnum):
    """Format of a tokenizer's files."""

    AUTO = "auto"
    """By what the files are."""
    HUGGINGFACE = "huggingface"
    """tokenizer.json: byte-level BPE, or Metaspace with byte fallback."""
    SENTENCEPIECE = "sentencepiece"
    """A SentencePiece .model."""
    TIKTOKEN = "tiktoken"
    """Lines of base64 and rank, as Llama 3's tokenizer.model and Qwen's qwen.tiktoken."""
    NONE = "none"
    """No tokenizer: a data set of bytes alone. Only preprocessing knows it."""


class EncodingError(ValueError):
    """A text that a tokenizer cannot encode."""

    def __init__(self, message: str, *, index: int) -> None:
        super().__init__(message)
        self.index = index
        """Place of the text in the batch."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Exceptions with keyword arguments do not cross a process boundary by themselves."""
        return _encoding_error, (str(self), self.index)


def _encoding_error(message: str, index: int) -> EncodingError:
    return EncodingError(message, index=index)


class DocumentTokenizer(Protocol):
    """What preprocessing and evaluation need of a tokenizer. It can be pickled: worker processes get the loaded one."""

    kind: TokenizerKind
    path: Path
    token_bytes: TokenBytes
    encoder: str
    """Which encoder was chosen and why, in one line."""

    @property
    def segmentation_hash(self) -> str:
        """sha256 in hexadecimal digits of all that decides which tokens a text gets, and of the ids that start and end
        a document. Wherever the files lie, equal for equal files, also where a JSON file's keys stand in another order.
        """
        ...

    def normalize(self, text: str) -> str:
        """The text the teacher really sees: it is the document. Idempotent."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """Tokens of each text [T], without special tokens; texts must be normalised. :class:`EncodingError` names the
        text where a single one cannot be encoded."""
        ...

    def encode_batch_reference(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """The same tokens by the slower encoder that :meth:`encode_batch` is checked against, if there are two."""
        ...


def load(
    path: str | Path,
    *,
    kind: TokenizerKind = TokenizerKind.AUTO,
    pattern: str | None = None,
    end_of_text: str | int | None = None,
    bos: str | int | None = None,
) -> DocumentTokenizer:
    """Loads a tokenizer from a Hugging Face folder or one of its files.

    ``pattern`` is a tiktoken file's split pattern (default: Llama 3's and Qwen's, for their own ranks only).
    ``end_of_text`` and ``bos``, a token's text or id, override what the configuration files say; a number in a text is
    an id where no token has that text. ValueError where files are missing, damaged or of a kind whose tokens have no
    exact bytes.
    """
    file, kind = _find(Path(path), kind)
    ids = SpecialIds.read(file.parent, end_of_text=end_of_text, bos=bos)
    if pattern is not None and kind is not TokenizerKind.TIKTOKEN:
        raise ValueError(f"{file}: a split pattern belongs to tiktoken files, this is {kind.value}; leave it out")
    # Importing here spares a worker the libraries that its format does not need.
    if kind is TokenizerKind.HUGGINGFACE:
        from megabyte_distill.data.tokenizer_json import JsonTokenizer

        return JsonTokenizer(file, ids)
    if kind is TokenizerKind.SENTENCEPIECE:
        from megabyte_distill.data.tokenizer_sentencepiece import SentencePieceTokenizer

        return SentencePieceTokenizer(file, ids)
    from megabyte_distill.data.tokenizer_tiktoken import TiktokenTokenizer

    return TiktokenTokenizer(file, ids, pattern=pattern)


def _find(path: Path, kind: TokenizerKind) -> tuple[Path, TokenizerKind]:
    """The tokenizer's file and its kind; a folder may hold several, of which tokenizer.json comes first."""
    if not path.exists():
        raise ValueError(f"{path}: no such tokenizer; expected a folder with tokenizer.json, or a tokenizer file")
    if path.is_file():
        candidates = [path]
    else:
        candidates = [path / name for name in ("tokenizer.json", "tokenizer.model") if (path / name).is_file()]
        candidates += sorted(path.glob("*.tiktoken"))
    kinds = [(file, _sniff(file)) for file in candidates]
    for file, found in kinds:
        if kind in (TokenizerKind.AUTO, found):
            return file, found
    wanted = "tokenizer.json, tokenizer.model or *.tiktoken" if kind is TokenizerKind.AUTO else f"a {kind.value} file"
    seen = ", ".join(f"{file.name} ({found.value})" for file, found in kinds) or "none"
    raise ValueError(f"{path}: no usable tokenizer; expected {wanted}, found {seen}")


def _sniff(file: Path) -> TokenizerKind:
    """Kind of a file by its first bytes; Llama 3's tokenizer.model is no SentencePiece model."""
    with open(file, "rb") as stream:
        head = stream.read(256)
    if head.lstrip()[:1] == b"{":
        return TokenizerKind.HUGGINGFACE
    if re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n", head):
        return TokenizerKind.TIKTOKEN
    return TokenizerKind.SENTENCEPIECE
