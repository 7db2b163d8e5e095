"""Which ids start and end a document, and how large the vocabulary is, by the files beside a tokenizer."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megabyte_distill.data.token_bytes import TokenBytes

MAX_IDS = 1 << 24
"""Above any vocabulary."""
_KNOWN_END = ("<|end_of_text|>", "<|endoftext|>", "</s>", "<eos>", "<|eos|>", "<|end|>")
_KNOWN_BOS = ("<|begin_of_text|>", "<s>", "<bos>", "<|bos|>")
_Named = str | int | None
_NUMBER = re.compile(r"[0-9]{1,8}")


@dataclass(frozen=True, kw_only=True, slots=True)
class SpecialIds:
    """A token each as text or id; None where the files do not say. A number in a text is an id where no token has
    that text."""

    end_of_text: _Named
    bos: _Named
    bos_is_known: bool
    """The files say what the BOS is, also if they say that there is none."""
    vocab_size: int | None
    """W of the model, at least the tokenizer's; None where there is no config.json."""

    @classmethod
    def read(cls, folder: Path, *, end_of_text: _Named = None, bos: _Named = None) -> SpecialIds:
        """From tokenizer_config.json, then config.json, then generation_config.json; arguments come before all."""
        tokenizer, model, generation = (
            _read_json(folder / name) for name in ("tokenizer_config.json", "config.json", "generation_config.json")
        )
        ends = (
            end_of_text,
            _content(tokenizer.get("eos_token")),
            model.get("eos_token_id"),
            generation.get("eos_token_id"),
        )
        starts = [bos]
        if "bos_token" in tokenizer:  # null there means that the family has none, whatever the model's config says
            starts.append(_content(tokenizer["bos_token"]))
        else:
            starts += [_first(model.get("bos_token_id")), _first(generation.get("bos_token_id"))]
        size = model.get("vocab_size")
        start = next((value for value in starts if value is not None), None)
        return cls(
            end_of_text=next((value for value in map(_first, ends) if value is not None), None),
            bos=start,
            bos_is_known=start is not None or "bos_token" in tokenizer or "bos_token_id" in model,
            vocab_size=size if isinstance(size, int) else None,
        )

    def table(
        self, tokens: list[bytes | None], name_to_id: Mapping[str, int] | Callable[[str], int | None], path: Path
    ) -> TokenBytes:
        """The token table with both ids resolved and padded to the model's vocabulary.

        ``name_to_id`` knows special tokens by their text. ValueError where no end-of-text token can be found.
        """
        look_up = name_to_id if callable(name_to_id) else name_to_id.get

        def find(text: str) -> int | None:
            index = look_up(text)
            return index if index is not None else _number(text, tokens)

        end = self.end_of_text
        if end is None:
            end = next((name for name in _KNOWN_END if look_up(name) is not None), None)
        if end is None:
            raise ValueError(
                f"{path}: cannot tell which token ends a document; put a tokenizer_config.json with eos_token beside "
                "it or name the token"
            )
        bos = self.bos
        if bos is None and not self.bos_is_known:
            # a guess must be a special token: in Qwen's vocabulary "<s>" is text
            places = {name: look_up(name) for name in _KNOWN_BOS}
            bos = next((name for name, index in places.items() if index is not None and tokens[index] is None), None)
        resolved: dict[str, int | None] = {}
        for role, value in (("end of text", end), ("BOS", bos)):
            resolved[role] = find(value) if isinstance(value, str) else value
            if value is not None and resolved[role] is None:
                raise ValueError(f"{path}: the {role} token {value!r} is not in the vocabulary")
        end_id = resolved["end of text"]
        assert end_id is not None
        size = self.vocab_size
        if size is not None and max(end_id, resolved["BOS"] or 0) < size and not any(tokens[size:]):
            tokens = tokens[:size]  # no text has these: Gemma 3's image token, which its smallest models lack
        table = TokenBytes.from_list(tokens, end_of_text_id=end_id, bos_id=resolved["BOS"])
        if size is None:
            return table
        try:
            return table.padded(size)
        except ValueError as error:
            raise ValueError(f"{path}: {error}; config.json beside it belongs to another tokenizer") from error


def size_with(size: int, named: SpecialIds, tokens: Collection[bytes]) -> int:
    """``size``, or more where a start or end id beyond it was given as a number. ``tokens``: bytes of all tokens."""
    numbers = [size - 1]
    for value in (named.end_of_text, named.bos):
        if isinstance(value, int):
            numbers.append(value)
        elif value is not None and _NUMBER.fullmatch(value) and value.encode() not in tokens:
            numbers.append(int(value))
    if max(numbers) >= MAX_IDS:
        raise ValueError(f"token id {max(numbers)} was given, expected less than {MAX_IDS}")
    return max(numbers) + 1


def _number(text: str, tokens: list[bytes | None]) -> int | None:
    """The id that a number in a text means, None where it is no number; a token of just that text comes first."""
    if not _NUMBER.fullmatch(text):
        return None
    token = text.encode()
    return tokens.index(token) if token in tokens else int(text)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not readable JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def _content(token: Any) -> _Named:
    """A token as tokenizer_config.json writes it: its text, or an object with its text."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _first(value: Any) -> _Named:
    """Instruction-tuned models list several end ids; the first is the one that ends a text."""
    if isinstance(value, list):
        value = value[0] if value else None
    return value if isinstance(value, (str, int)) else None
