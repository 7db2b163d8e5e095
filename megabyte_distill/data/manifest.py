"""Names of a stored data set's files, and the manifest that says what is in them."""

from __future__ import annotations

import hashlib
import json
import typing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SCHEMA_VERSION = 1
NO_TOKENIZER = "none"
PLACES_KEPT = 100
_JSON_KINDS: dict[Any, tuple[type, str]] = {
    int: (int, "a whole number from 0 to 2^63 - 1"),
    str: (str, "text"),
    bool: (bool, "true or false"),
    dict: (dict, "an object"),
    tuple: (list, "a list"),
}
"""Type of a field → what its JSON is read as."""
_DOCUMENT, _TOKENS, _MASK = "_document", "_tokens", "_loss_mask"


@dataclass(frozen=True, slots=True)
class StoredPaths:
    """Where the parts of a data set lie, from its stem PREFIX_{key}_document."""

    stem: str

    def __post_init__(self) -> None:
        if self.stem.endswith((".bin", ".idx", ".json")):
            raise ValueError(f"{self.stem}: expected the stem PREFIX_KEY_document without an ending such as .bin")
        if not self.stem.endswith(_DOCUMENT):
            raise ValueError(
                f"{self.stem}: expected a stem that ends in {_DOCUMENT}, as tools/preprocess_bytes.py writes it "
                "(PREFIX_KEY_document)"
            )

    @classmethod
    def of(cls, prefix: str | Path, key: str) -> StoredPaths:
        """The data set that preprocessing writes for one JSON key."""
        return cls(f"{prefix}_{key}{_DOCUMENT}")

    @property
    def byte_prefix(self) -> Path:
        """Of .bin and .idx: uint8, each item BOS and the document's bytes."""
        return Path(self.stem)

    @property
    def token_prefix(self) -> Path:
        """Of .bin and .idx: uint16 or int32, each item the teacher's start id and the document's tokens."""
        return Path(self.stem.removesuffix(_DOCUMENT) + _TOKENS)

    @property
    def mask_prefix(self) -> Path:
        """Of .bin and .idx, where there is a loss mask: int32, each item the spans of loss_mask.py."""
        return Path(self.stem.removesuffix(_DOCUMENT) + _MASK)

    @property
    def manifest(self) -> Path:
        return Path(self.stem + ".json")

    @property
    def token_table(self) -> Path:
        return Path(self.stem + ".token_bytes.npz")


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What preprocessing knows about a data set it wrote."""

    tokenizer_hash: str
    """TokenBytes.hash of the table beside it; :data:`NO_TOKENIZER` where the data set has bytes only."""
    vocab_size: int
    """W of that table; 0 for bytes only."""
    documents: int
    bytes: int
    """Of all documents, without BOS."""
    tokens: int
    """Of all documents, without the start id."""
    normalized_documents: int = 0
    """Documents whose text the tokenizer's normalisation changed; the changed text is the document."""
    skipped: dict[str, int] = field(default_factory=dict)
    """Reason → records left out."""
    skipped_at: dict[str, list[str]] = field(default_factory=dict)
    """Reason → file and line of the first :data:`PLACES_KEPT` of them; blank lines are counted only."""
    inputs: tuple[dict[str, Any], ...] = ()
    """Path, bytes and sha256 of each input file as it lies on the disk, in order."""
    append_eod: bool = False
    """Whether each token item ends with the teacher's end-of-text id."""
    loss_mask: bool = False
    """Whether a loss mask lies beside it, which tells what is trained on from what is a prompt."""
    marked: int = 0
    """Bytes, and ends of documents, that the loss mask marks."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What else decides the content: partitions with other settings are not merged."""
    partition: tuple[int, int] | None = None
    """(index, number of partitions) of a part that is to be merged; None for a whole data set."""
    tokenizer: str = ""
    """Kind and path of the tokenizer."""
    versions: dict[str, str] = field(default_factory=dict)
    """Library → version."""
    schema_version: int = SCHEMA_VERSION

    @property
    def has_tokens(self) -> bool:
        """False for a data set of bytes alone, which no stage can train on."""
        return self.tokenizer_hash != NO_TOKENIZER

    @property
    def digest(self) -> str:
        """sha256 in hex of what the data are: the inputs' hashes, the tokenizer's, the counts; not where they lie."""
        content = [self.tokenizer_hash, self.documents, self.bytes, self.tokens, [i.get("sha256") for i in self.inputs]]
        content += [self.marked] if self.loss_mask else []
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def load(cls, path: Path) -> Manifest:
        """Reads a manifest; ValueError names the file where it is missing, damaged or of another version."""
        try:
            content: Any = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise ValueError(f"{path}: no such file; the data set is incomplete, preprocess again") from error
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"{path}: not a readable manifest ({error}); preprocess again") from error
        if not isinstance(content, dict) or content.get("schema_version") != SCHEMA_VERSION:
            found = content.get("schema_version") if isinstance(content, dict) else type(content).__name__
            raise ValueError(f"{path}: manifest version {found}, expected {SCHEMA_VERSION}; preprocess again")
        problem = _damage(content)
        if problem is not None:
            raise ValueError(f"{path}: {problem}; preprocess again")
        content["inputs"] = tuple(content.get("inputs", ()))
        content["partition"] = tuple(content["partition"]) if content.get("partition") else None
        try:
            return cls(**content)
        except TypeError as error:
            raise ValueError(f"{path}: missing or unknown entries ({error}); preprocess again") from error


def _damage(content: dict[str, Any]) -> str | None:
    """What is wrong with the kinds of a manifest's entries, or None; absent and unknown entries are not looked at."""
    for name, hint in typing.get_type_hints(Manifest).items():
        expected = _JSON_KINDS.get(typing.get_origin(hint) or hint)
        if name not in content or expected is None:
            continue
        value, (kind, words) = content[name], expected
        if not isinstance(value, kind) or (kind is int and not _is_count(value)):
            return f"{name} is {_shown(value)}, expected {words}"
    inputs, partition = content.get("inputs", []), content.get("partition")
    if not all(isinstance(entry, dict) and all(map(_is_plain, entry.values())) for entry in inputs):
        return "inputs: expected one object of texts and numbers a file"
    if partition is not None and not (
        isinstance(partition, list) and len(partition) == 2 and all(map(_is_count, partition))
    ):
        return f"partition is {_shown(partition)}, expected null or two whole numbers"
    return None


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _is_plain(value: object) -> bool:
    return isinstance(value, str | int | float)


def _shown(value: object) -> str:
    return repr(value)[:80] if _is_plain(value) else f"of type {type(value).__name__}"
