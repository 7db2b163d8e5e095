"""A teacher's tokenizer as files that travel with the weights, and its token table beside them."""

from __future__ import annotations

import shutil
from pathlib import Path

from megabyte_distill.data import tokenizers
from megabyte_distill.data.token_bytes import TokenBytes

TOKENIZER_FOLDER = "tokenizer"
TOKEN_BYTES_FILE = "token_bytes.npz"
GENERATION_FILE = "generation_config.json"
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "*.tiktoken",
    "chat_template.jinja",
    GENERATION_FILE,
)


def copy_files(source: Path, target: Path, *, also: tuple[str, ...] = ()) -> None:
    """Copies whatever tokenizer files ``source`` has into ``target`` (made if needed), and the names in ``also``."""
    target.mkdir(parents=True, exist_ok=True)
    for pattern in (*_TOKENIZER_FILES, *also):
        for file in sorted(source.glob(pattern)):
            shutil.copyfile(file, target / file.name)


def token_table(folder: Path, vocab_size: int) -> TokenBytes:
    """The token table of a folder, saved or made from its tokenizer, padded to the model's W.

    ValueError where there is no usable tokenizer or it has more ids than the model.
    """
    saved = folder / TOKEN_BYTES_FILE
    table = TokenBytes.load(saved) if saved.is_file() else tokenizers.load(folder).token_bytes
    try:
        return table.padded(vocab_size)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}; tokenizer and weights must belong to one model") from error
