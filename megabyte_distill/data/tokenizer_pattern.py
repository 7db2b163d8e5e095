"""Split patterns of byte-level BPE, such that tiktoken and tokenizers cut every text at the same places.

Both run regular expressions, but with different engines, whose Unicode tables may be of different age and which read
``\\w`` differently. Hence a class whose characters differ between the two is written out as ranges.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

import tiktoken
from tokenizers import Regex, pre_tokenizers

_CONTRACTIONS = "'s|'t|'re|'ve|'m|'ll|'d"
GPT2_PATTERN = _CONTRACTIONS + r"| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""How ByteLevel cuts text by itself."""
_CLASS = re.compile(r"\\[pP](?:[A-Z]|\{\w+\})|\\[sSdDwW]")
# Contractions in any case, without what one engine takes for a ligature: ss is ß, fi is ﬁ.
_ANY_CASE = r"\(\?i:(?:['|]|\[[a-z]+\]|(?!ss|st|f[fil])[a-z])+\)"
# What both engines read alike. A possessive {1,3}+ is not among it, nor are anchors, dots and set operations.
_UNDERSTOOD = re.compile(
    "(?:"
    + "|".join(
        (
            _CLASS.pattern,
            r"\\[rnt]|\\x\{[0-9A-F]+\}|\\[^\w\s]",
            r"\((?!\?)|\(\?[:!=]|\)|\|",
            _ANY_CASE,
            r"\[\^?(?!:)|\]",
            r"[?*+][?+]?|\{\d+(?:,\d*)?\}(?!\+)\??",
            r"[^\\()\[\]|?*+{}.^$&]",
        )
    )
    + ")*"
)
_SINGLE_BYTES = {bytes([byte]): byte for byte in range(256)}


class NoFastPath(ValueError):
    """The tokenizer cannot be expressed for the other library; the message is the reason, in a few words."""


def elementary_steps(part: Any) -> Iterator[dict[str, Any]]:
    """The elementary steps of a normaliser, pre-tokenizer or decoder of a tokenizer.json."""
    if part is None:
        return
    nested = next((part[key] for key in ("normalizers", "pretokenizers", "decoders") if key in part), None)
    if nested is None:
        yield part
    else:
        for step in nested:
            yield from elementary_steps(step)


def pattern_for_tiktoken(pre_tokenizer: dict[str, Any] | None) -> str:
    """The pattern with which tiktoken cuts as this pre-tokenizer of a tokenizer.json does; NoFastPath where none is
    known."""
    steps = list(elementary_steps(pre_tokenizer))
    types = [step["type"] for step in steps]
    if not types or types[-1] != "ByteLevel":
        raise NoFastPath(f"pre-tokenizer {'+'.join(types) or 'missing'} does not end in ByteLevel")
    by_itself = steps[-1].get("use_regex", True)
    if types == ["ByteLevel"] and by_itself:
        pattern = GPT2_PATTERN
    elif types == ["Digits", "ByteLevel"] and by_itself:
        pattern = _gpt2_with_digits(individual=bool(steps[0].get("individual_digits")))
    elif types == ["Split", "ByteLevel"] and not by_itself:
        pattern = _split_pattern(steps[0])
    else:
        raise NoFastPath(f"pre-tokenizer {'+'.join(types)} is not a single pattern")
    pattern = _read_alike(pattern, _by_tokenizers, _by_tiktoken)
    # tokenizers keeps what the pattern leaves out as a piece of its own, tiktoken drops it.
    if len(_bytes_only(pattern).encode_to_numpy(_characters(), disallowed_special=())) != len(_characters().encode()):
        raise NoFastPath("the split pattern leaves characters out")
    return pattern


def pattern_for_tokenizers(pattern: str) -> str:
    """The pattern with which tokenizers cuts as tiktoken does with ``pattern``; NoFastPath where it is not known."""
    return _read_alike(pattern, _by_tiktoken, _by_tokenizers)


def _split_pattern(step: dict[str, Any]) -> str:
    regex = step["pattern"].get("Regex")
    # Removing all that does not match is keeping the matches.
    behaviour = step.get("behavior"), bool(step.get("invert"))
    if regex is None or behaviour not in (("Isolated", False), ("Removed", True)):
        raise NoFastPath(f"Split with {step['pattern']} and behaviour {behaviour[0]} is not a plain pattern")
    return str(regex)


def _gpt2_with_digits(*, individual: bool) -> str:
    """GPT-2's pattern on the text between numbers, where a number ends a run of spaces as the text's end does."""
    digits = _digits()
    if digits == _by_tokenizers(r"\p{N}"):
        number = r"\p{N}"
    elif individual and set(digits) >= set(_by_tokenizers(r"\p{N}")):
        number = _ranges(digits)  # Rust's own tables may be newer than the engine's
    else:
        raise NoFastPath("Digits cuts other characters than numbers")
    if not set(digits).isdisjoint(_by_tokenizers(r"\p{L}") + _by_tokenizers(r"\s")):
        raise NoFastPath("Digits cuts letters")
    plus = "" if individual else "+"
    return rf"{_CONTRACTIONS}| ?\p{{L}}+|{number}{plus}| ?[^\s\p{{L}}\p{{N}}{number}]+|\s+(?![^\s{number}])|\s+"


def _read_alike(pattern: str, truth: Callable[[str], str], runner: Callable[[str], str]) -> str:
    """``pattern`` with the classes in which ``runner`` sees other characters than ``truth`` written out."""
    if not _UNDERSTOOD.fullmatch(pattern):
        raise NoFastPath("the split pattern uses constructs that engines may read differently")

    def written_out(match: re.Match[str]) -> str:
        name: str = match[0]
        positive = name[0] + name[1].lower() + name[2:]
        characters = truth(positive)
        return name if characters == runner(positive) else _ranges(characters, negated=name != positive)

    return _CLASS.sub(written_out, pattern)


def _ranges(characters: str, *, negated: bool = False) -> str:
    """A character class of exactly these characters, which come in order."""
    pairs: list[list[int]] = []
    for code in map(ord, characters):
        if pairs and pairs[-1][1] == code - 1:
            pairs[-1][1] = code
        else:
            pairs.append([code, code])
    inside = "".join(rf"\x{{{first:X}}}-\x{{{last:X}}}" for first, last in pairs)
    return f"[{'^' if negated else ''}{inside}]"


def _bytes_only(pattern: str) -> tiktoken.Encoding:
    return tiktoken.Encoding("bytes", pat_str=pattern, mergeable_ranks=_SINGLE_BYTES, special_tokens={})


@functools.cache
def _characters() -> str:
    """All that can differ: planes 4 to 13 are empty, 15 and 16 private."""
    return "".join(map(chr, (*range(0xD800), *range(0xE000, 0x40000), *range(0xE0000, 0xE1000))))


@functools.cache
def _by_tiktoken(name: str) -> str:
    """All characters of a class in tiktoken's eyes, in order: it drops what a pattern does not match."""
    return bytes(_bytes_only(name).encode_ordinary(_characters())).decode()


@functools.cache
def _by_tokenizers(name: str) -> str:
    """All characters of a class in tokenizers' eyes, in order."""
    runs = pre_tokenizers.Split(Regex(f"{name}+"), "removed", invert=True).pre_tokenize_str(_characters())
    return "".join(run for run, _ in runs)


@functools.cache
def _digits() -> str:
    """All characters that the Digits step cuts, in order: every second run, as the first character is none."""
    runs = pre_tokenizers.Digits(individual_digits=False).pre_tokenize_str(_characters())
    return "".join(run for run, _ in runs[1::2])
