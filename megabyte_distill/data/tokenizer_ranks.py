"""Byte-level BPE as merges (tokenizers) and as ranks (tiktoken), and when the two are the same."""

from __future__ import annotations

import collections
import operator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from megabyte_distill.data.tokenizer_pattern import NoFastPath, pattern_for_tokenizers

_UTF8_BYTES = (*range(0xC0), *range(0xC2, 0xF5))


@dataclass(frozen=True, slots=True)
class Ranks:
    """What tiktoken merges by."""

    by_token: dict[bytes, int]
    """The lower, the earlier; single bytes have one too."""
    ids: NDArray[np.int32] | None
    """Token id of each rank, −1 for a byte that the vocabulary lacks; None where the rank is the id."""


def byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte: itself where Latin-1 prints it, else a code point from 256 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


def ranks_of(spec: dict[str, Any], tokenizer: Tokenizer) -> Ranks:
    """Ranks with which tiktoken gives the ids of a byte-level BPE; NoFastPath where that cannot be shown.

    ``spec`` is the tokenizer.json of ``tokenizer``. tiktoken joins any two neighbours that spell a token, tokenizers
    only the pairs among its merges. If two neighbours spell a token and are no merge, then merging that token's bytes
    alone comes to the same two and stops: each merge inside its span was the best one there too. So both agree where
    every ranked token comes out of its own bytes, or has all its pairs among the merges.
    """
    model = spec["model"]
    _check_model(model)
    vocabulary: dict[str, int] = model["vocab"]
    spelled = _spelled(vocabulary)
    singles = [text for text in spelled if len(text) == 1]
    # Without a rank of their own they would stop tiktoken.
    lacking = sorted(set(_UTF8_BYTES).difference(spelled[text][0] for text in singles))
    order = [text for text in _merge_order(model["merges"]) if text in spelled]
    if model.get("ignore_merges"):  # a piece that is a token is taken whole, as tiktoken does always
        order += sorted({text for text in spelled if len(text) > 1}.difference(order), key=vocabulary.__getitem__)
        _check_all_pairs(_not_from_own_bytes(tokenizer, vocabulary, order), model)
    else:  # what merging does not give never comes out
        lost = _not_from_own_bytes(tokenizer, vocabulary, order)
        order = [text for text in order if text not in lost]
    ranked = [*singles, *order]
    ids = np.array([vocabulary[text] for text in ranked], dtype=np.int32)
    if not lacking and (np.diff(ids[len(singles) :]) > 0).all():
        return Ranks({spelled[text]: vocabulary[text] for text in ranked}, None)
    tokens = [*(spelled[text] for text in ranked), *(bytes([byte]) for byte in lacking)]
    ids = np.append(ids, np.full(len(lacking), -1, dtype=np.int32))
    return Ranks({token: rank for rank, token in enumerate(tokens)}, ids)


def tokenizer_of(ranks: dict[bytes, int], pattern: str) -> Tokenizer:
    """A tokenizers Tokenizer with tiktoken's ids; its merges are all pairs that spell a token.

    NoFastPath where the pattern may be read differently.
    """
    letters = {byte: character for character, byte in byte_level_alphabet().items()}
    regex = Regex(pattern_for_tokenizers(pattern))
    spelled = {token: "".join(map(letters.__getitem__, token)) for token in ranks}
    merges = [
        (spelled[token[:cut]], spelled[token[cut:]])
        for token in sorted(ranks, key=ranks.__getitem__)
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    ]
    vocabulary = {spelled[token]: rank for token, rank in ranks.items()}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(regex, "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return tokenizer


def _check_model(model: dict[str, Any]) -> None:
    if model.get("type") != "BPE":
        raise NoFastPath(f"model {model.get('type')} is not BPE")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(name):
            raise NoFastPath(f"BPE with {name}")


def _spelled(vocabulary: dict[str, int]) -> dict[str, bytes]:
    """Bytes of the tokens that are spelled in the byte-level alphabet; others can never come out."""
    outside = "\uffff"
    table: dict[int, str] = collections.defaultdict(lambda: outside)
    table.update({ord(character): chr(byte) for character, byte in byte_level_alphabet().items()})
    translated = ((text, text.translate(table)) for text in vocabulary if text)
    return {text: spelling.encode("latin-1") for text, spelling in translated if outside not in spelling}


def _merged(merge: str | list[str]) -> str:
    """The token that a merge gives; older files write a merge as one string."""
    return merge.replace(" ", "", 1) if isinstance(merge, str) else "".join(merge)


def _merge_order(merges: list[str | list[str]]) -> dict[str, None]:
    """Merged tokens in the order of the merges; NoFastPath unless all merges of a token stand together."""
    merged = list(map(_merged, merges))
    order = dict.fromkeys(merged)
    if len(order) != len(merged[:1]) + sum(map(operator.ne, merged, merged[1:])):
        raise NoFastPath("a token's merges do not stand together")
    return order


def _not_from_own_bytes(tokenizer: Tokenizer, vocabulary: dict[str, int], texts: list[str]) -> set[str]:
    """Tokens that merging their own bytes does not give."""
    model = tokenizer.model
    takes_whole = model.ignore_merges
    model.ignore_merges = False
    try:
        return {text for text in texts if [token.id for token in model.tokenize(text)] != [vocabulary[text]]}
    finally:
        model.ignore_merges = takes_whole


def _check_all_pairs(tokens: set[str], model: dict[str, Any]) -> None:
    """NoFastPath where two vocabulary entries spell one of ``tokens`` and are no merge."""
    merges = [merge for merge in model["merges"] if _merged(merge) in tokens]
    pairs = {tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in merges}
    for token in tokens:
        for pair in ((token[:cut], token[cut:]) for cut in range(1, len(token))):
            if pair not in pairs and pair[0] in model["vocab"] and pair[1] in model["vocab"]:
                raise NoFastPath("a token that is taken whole has pairs outside the merges")
