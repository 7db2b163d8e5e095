"""Hugging Face's tokenizer.json, made exact: byte-level BPE, and Metaspace or Replace(" " → "▁") with byte fallback."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, normalizers

from megabyte_distill.data.tokenizer_ids import SpecialIds
from megabyte_distill.data.tokenizers import TokenizerKind

SPACE_MARK = "▁"
"""U+2581: how SentencePiece's family writes a space. In text it is read as one, so the document has the space."""
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class JsonTokenizer:
    """See :class:`megabyte_distill.data.tokenizers.DocumentTokenizer`."""

    kind = TokenizerKind.HUGGINGFACE

    def __init__(self, path: Path, ids: SpecialIds) -> None:
        """Reads tokenizer.json; ValueError where it is damaged or its tokens have no exact bytes."""
        self.path = path
        try:
            spec: Any = json.loads(path.read_text(encoding="utf-8"))
            steps = [step for name in ("normalizer", "pre_tokenizer", "decoder") for step in _steps(spec.get(name))]
            model_type = spec["model"].get("type")
            names = {step["type"] for step in steps}
        except (OSError, UnicodeDecodeError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{path}: not a tokenizer.json ({type(error).__name__}: {error})") from error
        byte_level = "ByteLevel" in names
        marked = "Metaspace" in names or any(_is_space_mark(step) for step in steps)
        if not byte_level and not marked:
            raise ValueError(
                f"{path}: model {model_type} with {', '.join(sorted(names)) or 'no steps'}: tokens without "
                "exact bytes; expected byte-level BPE, or Metaspace with byte fallback"
            )
        self._marked = marked and not byte_level
        self._normalizer = _text_normalizer(spec["normalizer"]) if spec.get("normalizer") else None
        try:
            self._tokenizer = Tokenizer.from_str(json.dumps(_without_additions(spec)))
        except Exception as error:
            raise ValueError(f"{path}: the tokenizers library does not read it ({error})") from error
        self._tokenizer.encode_special_tokens = True
        tokens = _token_bytes(self._tokenizer, spec, byte_level=byte_level)
        self.token_bytes = ids.table(tokens, self._tokenizer.token_to_id, path)

    def normalize(self, text: str) -> str:
        """The tokenizer's normaliser without its space marks; a literal U+2581 counts as a space for that family."""
        if self._marked:
            text = text.replace(SPACE_MARK, " ")
        return text if self._normalizer is None else self._normalizer.normalize_str(text)

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """Tokens of each text, int32 [T]."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]


def _steps(part: Any) -> Iterator[dict[str, Any]]:
    """The elementary steps of a normaliser, pre-tokenizer or decoder."""
    if part is None:
        return
    nested = next((part[key] for key in ("normalizers", "pretokenizers", "decoders") if key in part), None)
    if nested is None:
        yield part
    else:
        for step in nested:
            yield from _steps(step)


def _is_space_mark(step: dict[str, Any]) -> bool:
    """A normaliser step that writes spaces as marks, which is notation and not a change of the text."""
    if step["type"] == "Prepend":
        return True
    return step["type"] == "Replace" and step.get("pattern") == {"String": " "} and step.get("content") == SPACE_MARK


def _text_normalizer(spec: dict[str, Any]) -> normalizers.Normalizer | None:
    """The steps that change the text itself."""
    steps = [step for step in _steps(spec) if not _is_space_mark(step) and step["type"] != "ByteLevel"]
    if not steps:
        return None
    alone = {"added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}}
    whole = {**alone, "version": "1.0", "normalizer": {"type": "Sequence", "normalizers": steps}}
    normalizer: normalizers.Normalizer | None = Tokenizer.from_str(json.dumps(whole)).normalizer
    return normalizer


def _without_additions(spec: dict[str, Any]) -> dict[str, Any]:
    """The same tokenizer without whatever adds to the text or cuts it: dummy prefix, template, truncation, padding."""

    def cleaned(part: Any) -> Any:
        if isinstance(part, list):
            return [cleaned(step) for step in part if not (isinstance(step, dict) and step.get("type") == "Prepend")]
        if not isinstance(part, dict):
            return part
        result = {key: cleaned(value) for key, value in part.items()}
        if result.get("type") == "ByteLevel":
            result["add_prefix_space"] = False
        if result.get("type") == "Metaspace":
            result.pop("add_prefix_space", None)
            result["prepend_scheme"] = "never"
        return result

    normalizer = spec.get("normalizer")
    if normalizer is not None and normalizer.get("type") == "Prepend":
        normalizer = None
    return {
        **spec,
        "normalizer": cleaned(normalizer),
        "pre_tokenizer": cleaned(spec.get("pre_tokenizer")),
        "post_processor": None,
        "truncation": None,
        "padding": None,
    }


def _token_bytes(tokenizer: Tokenizer, spec: dict[str, Any], *, byte_level: bool) -> list[bytes | None]:
    """Bytes by id; None for special, unknown and missing ids."""
    added = {token["id"]: token for token in spec.get("added_tokens") or ()}
    vocabulary: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
    unknown = spec["model"].get("unk_token")
    fallback = bool(spec["model"].get("byte_fallback"))
    result: list[bytes | None] = [None] * (1 + max(vocabulary.values(), default=-1))
    if not result:
        raise ValueError("the vocabulary is empty")
    alphabet = _byte_level_alphabet()
    for text, index in vocabulary.items():
        if index in added:
            result[index] = None if added[index].get("special") else added[index]["content"].encode()
        elif text == unknown:
            continue
        elif byte_level:
            # A token with a character outside the alphabet can never come out of the model.
            known = all(character in alphabet for character in text)
            result[index] = bytes(alphabet[character] for character in text) if known else None
        else:
            match = _BYTE_TOKEN.fullmatch(text) if fallback else None
            result[index] = bytes.fromhex(match[1]) if match else text.replace(SPACE_MARK, " ").encode()
    return result


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte: itself where Latin-1 prints it, else a code point from 256 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}
