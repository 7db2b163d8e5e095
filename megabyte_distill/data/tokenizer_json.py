"""Hugging Face's tokenizer.json, made exact: byte-level BPE, and Metaspace or Replace(" " → "▁") with byte fallback."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray
from tokenizers import Tokenizer, normalizers

from megabyte_distill.data.tokenizer_fast import fast_encoder, plain_ids
from megabyte_distill.data.tokenizer_identity import identity_of
from megabyte_distill.data.tokenizer_ids import MAX_IDS, SpecialIds
from megabyte_distill.data.tokenizer_normal_form import NORMAL_FORMS, NormalForm, is_normal
from megabyte_distill.data.tokenizer_pattern import elementary_steps
from megabyte_distill.data.tokenizer_ranks import byte_level_alphabet
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
            steps = [
                step for name in ("normalizer", "pre_tokenizer", "decoder") for step in elementary_steps(spec.get(name))
            ]
            model_type = spec["model"].get("type")
            names = {step["type"] for step in steps}
            byte_level = "ByteLevel" in names
            marked = not byte_level and ("Metaspace" in names or any(_is_space_mark(step) for step in steps))
            added = {token["content"]: token for token in spec.get("added_tokens") or () if _check_added(token)}
            bare = _without_additions(spec, added, _user_defined(spec["model"], added) if marked else [])
        except (OSError, UnicodeDecodeError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{path}: not a tokenizer.json ({type(error).__name__}: {error})") from error
        if not byte_level and not marked:
            raise ValueError(
                f"{path}: model {model_type} with {', '.join(sorted(names)) or 'no steps'}: tokens without "
                "exact bytes; expected byte-level BPE, or Metaspace with byte fallback"
            )
        self._marked = marked
        try:
            self._normalizer, self._form = _text_normalizer(spec.get("normalizer"))
            self._bare = json.dumps(bare)
            vocabulary = {text: token["id"] for text, token in added.items()} | self._tokenizer.get_vocab()
        except Exception as error:
            raise ValueError(f"{path}: the tokenizers library does not read it ({error})") from error
        tokens = _token_bytes(vocabulary, spec, added, byte_level=byte_level)
        self.token_bytes = ids.table(tokens, vocabulary, path)
        events = (self.token_bytes.end_of_text_id, self.token_bytes.bos_id)
        text = [token for token in bare["added_tokens"] if vocabulary[token["content"]] not in events]
        if len(text) < len(bare["added_tokens"]):
            self._bare = json.dumps({**bare, "added_tokens": text})
            del self._tokenizer
        self._fast, self.encoder = None, "tokenizers, batched (not byte-level)"
        if byte_level:
            self._fast, self.encoder = fast_encoder(
                bare,
                self._tokenizer,
                self.encode_batch_reference,
                tokens=tokens,
                names=list(added),
                normalize=self.normalize,
            )

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        """Made again where this object was sent to another process, if a text needs it there."""
        return Tokenizer.from_str(self._bare)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_tokenizer"}

    @cached_property
    def segmentation_hash(self) -> str:
        """See :class:`megabyte_distill.data.tokenizers.DocumentTokenizer`; added tokens that no text becomes do not
        count."""
        spec = orjson.loads(self._bare)
        if "merges" in spec["model"]:  # newer files write a merge as two strings
            merges = spec["model"]["merges"]
            spec["model"]["merges"] = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
        return identity_of(self.token_bytes, kind=self.kind, spec=spec, marked=self._marked)

    def normalize(self, text: str) -> str:
        """The tokenizer's normaliser without its space marks; a literal U+2581 counts as a space for that family."""
        if self._marked:
            text = text.replace(SPACE_MARK, " ")
        if self._normalizer is None or (self._form is not None and is_normal(text, self._form)):
            return text
        return self._normalizer.normalize_str(text)

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """Tokens of each text, int32 [T], by the encoder that :attr:`encoder` names."""
        return self.encode_batch_reference(texts) if self._fast is None else self._fast.encode_batch(texts)

    def encode_batch_reference(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """Tokens of each text, int32 [T], by tokenizers alone."""
        return plain_ids(self._tokenizer, texts)


def _check_added(token: dict[str, Any]) -> bool:
    """True; ValueError for an added token without text or with an id that no vocabulary has."""
    if not isinstance(token["content"], str) or not isinstance(token["id"], int) or not 0 <= token["id"] < MAX_IDS:
        raise ValueError(
            f"added token {token['content']!r} with id {token['id']!r}, expected a text and an id from 0 on"
        )
    return True


def _is_space_mark(step: dict[str, Any]) -> bool:
    """A normaliser step that writes spaces as marks, which is notation and not a change of the text."""
    if step["type"] == "Prepend":
        return True
    return step["type"] == "Replace" and step.get("pattern") == {"String": " "} and step.get("content") == SPACE_MARK


def _text_normalizer(spec: dict[str, Any] | None) -> tuple[normalizers.Normalizer | None, NormalForm | None]:
    """The steps that change the text itself, and the normal form if they are that and nothing else."""
    steps = [step for step in elementary_steps(spec) if not _is_space_mark(step) and step["type"] != "ByteLevel"]
    if not steps:
        return None, None
    alone = {"added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}}
    whole = {**alone, "version": "1.0", "normalizer": {"type": "Sequence", "normalizers": steps}}
    normalizer: normalizers.Normalizer | None = Tokenizer.from_str(json.dumps(whole)).normalizer
    forms = [form for form in NORMAL_FORMS if [step["type"] for step in steps] == [form]]
    return normalizer, forms[0] if forms else None


def _user_defined(model: dict[str, Any], added: dict[str, Any]) -> list[dict[str, Any]]:
    """Added tokens that were user-defined symbols of a SentencePiece model, found by being in its vocabulary and not
    special: Gemma's runs of spaces and line ends and its HTML tags. They are text, of which the teacher has learnt that
    it comes in one piece. The unknown token is none, whatever the file says: no text is its."""
    ordinary = {text: token for text, token in added.items() if not token.get("special")}
    pieces = [token for text, token in ordinary.items() if text in model["vocab"] and text != model.get("unk_token")]
    return [{**token, "lstrip": False, "rstrip": False} for token in pieces]  # what is stripped would be lost


def _without_additions(
    spec: dict[str, Any], added: Collection[str], user_defined: list[dict[str, Any]]
) -> dict[str, Any]:
    """The same tokenizer without whatever adds to the text or cuts it: dummy prefix, template, truncation, padding,
    and without added tokens but for ``user_defined``: others would turn a document's "<tool_call>" into an event."""

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
        "added_tokens": user_defined,
        "model": _without_added(spec["model"], added),
        "normalizer": cleaned(normalizer),
        "pre_tokenizer": cleaned(spec.get("pre_tokenizer")),
        "post_processor": None,
        "truncation": None,
        "padding": None,
    }


def _without_added(model: dict[str, Any], added: Collection[str]) -> dict[str, Any]:
    """The model without vocabulary entries that only stand for added tokens, where it takes any entry whole."""
    inside = {text for text in added if text in model["vocab"] and len(text) > 1 and text != model.get("unk_token")}
    if not model.get("ignore_merges") or not inside:
        return model
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        inside -= {left, right, left + right}
    return {**model, "vocab": {text: index for text, index in model["vocab"].items() if text not in inside}}


def _token_bytes(
    vocabulary: dict[str, int], spec: dict[str, Any], added: dict[str, Any], *, byte_level: bool
) -> list[bytes | None]:
    """Bytes by id; None for special, unknown and missing ids."""
    unknown = spec["model"].get("unk_token")
    fallback = bool(spec["model"].get("byte_fallback"))
    result: list[bytes | None] = [None] * (1 + max(vocabulary.values(), default=-1))
    if not result:
        raise ValueError("the vocabulary is empty")
    alphabet = byte_level_alphabet()
    for text, index in vocabulary.items():
        if text in added and (byte_level or added[text].get("special")):
            result[index] = None if added[text].get("special") else text.encode()
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
