"""Names of a stored data set's files, and the manifest that says what is in them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SCHEMA_VERSION = 1
_DOCUMENT, _TOKENS = "_document", "_tokens"


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
    def manifest(self) -> Path:
        return Path(self.stem + ".json")

    @property
    def token_table(self) -> Path:
        return Path(self.stem + ".token_bytes.npz")


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What preprocessing knows about a data set it wrote."""

    tokenizer_hash: str
    """TokenBytes.hash of the table beside it."""
    vocab_size: int
    """W of that table."""
    documents: int
    bytes: int
    """Of all documents, without BOS."""
    tokens: int
    """Of all documents, without the start id."""
    normalized_documents: int = 0
    """Documents whose text the tokenizer's normalisation changed; the changed text is the document."""
    skipped: dict[str, int] = field(default_factory=dict)
    """Reason → lines left out."""
    inputs: tuple[dict[str, str], ...] = ()
    """Path and sha256 of each input file, in order."""
    tokenizer: str = ""
    """Kind and path of the tokenizer."""
    versions: dict[str, str] = field(default_factory=dict)
    """Library → version."""
    schema_version: int = SCHEMA_VERSION

    @property
    def digest(self) -> str:
        """sha256 in hex of what the data are: the inputs' hashes, the tokenizer's, the counts; not where they lie."""
        content = [self.tokenizer_hash, self.documents, self.bytes, self.tokens, [i.get("sha256") for i in self.inputs]]
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
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path}: not a readable manifest ({error}); preprocess again") from error
        if not isinstance(content, dict) or content.get("schema_version") != SCHEMA_VERSION:
            found = content.get("schema_version") if isinstance(content, dict) else type(content).__name__
            raise ValueError(f"{path}: manifest version {found}, expected {SCHEMA_VERSION}; preprocess again")
        integers = ("vocab_size", "documents", "bytes", "tokens")
        if not all(isinstance(content.get(name), int) for name in integers) or not isinstance(
            content.get("tokenizer_hash"), str
        ):
            raise ValueError(f"{path}: {', '.join(integers)} must be numbers and tokenizer_hash text; preprocess again")
        content["inputs"] = tuple(content.get("inputs", ()))
        try:
            return cls(**content)
        except TypeError as error:
            raise ValueError(f"{path}: unknown entries ({error}); preprocess again") from error
