"""Published rank files: what belongs to them and is not in them."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from megabyte_distill.data.tokenizer_normal_form import NormalForm

LLAMA3_RANKS = 128_000
QWEN_RANKS = 151_643


def _pattern(numbers: str) -> str:
    """Both families cut text alike, but for numbers."""
    return "|".join(
        (
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
            r"[^\r\n\p{L}\p{N}]?\p{L}+",
            numbers,
            r" ?[^\s\p{L}\p{N}]+[\r\n]*",
            r"\s*[\r\n]+",
            r"\s+(?!\S)",
            r"\s+",
        )
    )


LLAMA3_PATTERN = _pattern(r"\p{N}{1,3}")
"""How Llama 3 cuts text before merging."""
QWEN_PATTERN = _pattern(r"\p{N}")
"""How Qwen cuts text before merging."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RankFile:
    """A published rank file, known by its ranks."""

    name: str
    ranks: int
    """How many there are."""
    digest: str
    """What :func:`digest_of` gives for them."""
    pattern: str
    """Split pattern."""
    normal_form: NormalForm | None
    """What its tokenizer puts text into first."""
    specials: Mapping[str, int]
    """Ids of special tokens by their text; those whose text differs between releases are left out."""
    vocab_size: int
    """W of its tokenizer: the ranks and all special ids, the left out ones too."""


_QWEN_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{index}|>" for index in range(205)))

KNOWN_RANK_FILES = (
    RankFile(
        name="Llama 3",
        ranks=LLAMA3_RANKS,
        digest="3e40aced3ec172050e2452c05fc9e1e25b55b58c914d7790b491d618eba6b872",
        pattern=LLAMA3_PATTERN,
        normal_form=None,
        specials=MappingProxyType(
            {
                "<|begin_of_text|>": LLAMA3_RANKS,
                "<|end_of_text|>": LLAMA3_RANKS + 1,
                "<|start_header_id|>": LLAMA3_RANKS + 6,
                "<|end_header_id|>": LLAMA3_RANKS + 7,
                "<|eot_id|>": LLAMA3_RANKS + 9,
            }
        ),
        vocab_size=LLAMA3_RANKS + 256,
    ),
    RankFile(
        name="Qwen",
        ranks=QWEN_RANKS,
        digest="d3ee67455bf46f48f9bd854941ea0e080a1bb1add36d72a9a3448cf16c5d320a",
        pattern=QWEN_PATTERN,
        normal_form="NFC",
        specials=MappingProxyType({text: QWEN_RANKS + index for index, text in enumerate(_QWEN_SPECIALS)}),
        vocab_size=QWEN_RANKS + len(_QWEN_SPECIALS),
    ),
)


def digest_of(ranks: Mapping[bytes, int]) -> str:
    """sha256, in hexadecimal digits, of the tokens in the order of their ranks: base64, with a newline between two."""
    ordered = sorted(ranks, key=ranks.__getitem__)
    return hashlib.sha256(b"\n".join(map(base64.b64encode, ordered))).hexdigest()


def known_rank_file(ranks: Mapping[bytes, int]) -> RankFile | None:
    """The published file with exactly these ranks; the same number of others may have been made for another pattern."""
    if all(known.ranks != len(ranks) for known in KNOWN_RANK_FILES):
        return None
    digest = digest_of(ranks)
    return next((known for known in KNOWN_RANK_FILES if known.digest == digest), None)
