"""Byte-level BPE by tiktoken, with tokenizers for the documents that tiktoken does not manage."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tiktoken
from numpy.typing import NDArray
from tokenizers import Tokenizer

from megabyte_distill.data.tokenizer_normal_form import NORMAL_FORMS
from megabyte_distill.data.tokenizer_pattern import NoFastPath, elementary_steps, pattern_for_tiktoken
from megabyte_distill.data.tokenizer_ranks import Ranks, ranks_of
from megabyte_distill.data.tokenizer_selftest import Encode, first_difference, selftest_texts
from megabyte_distill.data.tokenizers import EncodingError

# Never looked for; without any special token tiktoken tries an empty one at every character, at half the speed.
_NO_SPECIAL = "\U0010fffeno special token\U0010fffe"
# tiktoken's regular expression gives up somewhere between 100,000 and a million spaces, and up to version 0.9 the time
# for a piece grows with its square. A run of twice this length covers a block that starts at a multiple of it.
_BLOCK = 10_000
_SYMBOLS = re.compile(r"(?:[^\w\s]|_)++")


def plain_ids(tokenizer: Tokenizer, texts: Sequence[str]) -> list[NDArray[np.int32]]:
    """Tokens of each text [T] by tokenizers alone."""
    encodings = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]


class TiktokenEncoder:
    """Encodes texts with tiktoken. To ``reference`` goes a text with an endless run, with a byte that the vocabulary
    lacks, or that tiktoken gives up."""

    def __init__(self, name: str, pattern: str, ranks: Ranks, reference: Encode) -> None:
        """``reference`` must give the same ids. Whatever tiktoken raises for bad ranks or patterns is not caught."""
        self._ids = ranks.ids
        self._lacks_bytes = ranks.ids is not None and bool((ranks.ids < 0).any())
        self._reference = reference
        special = {_NO_SPECIAL: max(ranks.by_token.values()) + 1}
        self._encoding = tiktoken.Encoding(
            name, pat_str=pattern, mergeable_ranks=ranks.by_token, special_tokens=special
        )

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """Tokens of each text [T]. An EncodingError of the reference names the text's place among ``texts``."""
        found = [self.encode(text) for text in texts]
        left = [index for index, ids in enumerate(found) if ids is None]
        try:
            others = iter(self._reference([texts[index] for index in left]) if left else ())
        except EncodingError as error:
            raise EncodingError(str(error), index=left[error.index]) from error
        return [next(others) if ids is None else ids for ids in found]

    def encode(self, text: str) -> NDArray[np.int32] | None:
        """Tokens of a text [T] by tiktoken; None where the text is for the reference."""
        if has_endless_run(text):
            return None
        try:
            ranks = self._encoding.encode_to_numpy(text, disallowed_special=()).view(np.int32)
        except UnicodeEncodeError:
            raise
        except ValueError:  # its regular expression ran out of stack
            return None
        except BaseException as error:  # up to version 0.9 it panics then, and that is no Exception
            if type(error).__name__ != "PanicException":
                raise
            return None
        if self._ids is None:
            return ranks
        ids = self._ids[ranks]
        return None if self._lacks_bytes and (ids < 0).any() else ids


def has_endless_run(text: str) -> bool:
    """True where 20,000 characters in a row are all spaces, all letters, all numbers or all symbols; perhaps also for
    10,000. Costs next to nothing for other text: each look at a block ends at the first character that differs."""
    for start in range(0, len(text) - _BLOCK + 1, _BLOCK):
        block = text[start : start + _BLOCK]
        if block.isspace() or block.isalpha() or block.isnumeric() or _SYMBOLS.fullmatch(block):
            return True
    return False


def fast_encoder(
    spec: dict[str, Any],
    tokenizer: Tokenizer,
    reference: Encode,
    *,
    tokens: list[bytes | None],
    names: list[str],
    normalize: Callable[[str], str],
) -> tuple[TiktokenEncoder | None, str]:
    """The fast path of a tokenizer.json, None where there is none, and in one line which encoder is used and why.

    ``reference`` encodes by ``tokenizer``, made from ``spec``, which has no added tokens; ``names`` are their texts,
    ``tokens`` the vocabulary's bytes by id.
    """

    try:
        steps = [step["type"] for step in elementary_steps(spec.get("normalizer"))]
        # Other normalisers may change a text again that is normalised already, and only tokenizers would do that.
        if steps and (len(steps) > 1 or steps[0] not in NORMAL_FORMS):
            raise NoFastPath(f"normaliser {'+'.join(steps)}")
        pattern = pattern_for_tiktoken(spec.get("pre_tokenizer"))
        try:
            encoder = TiktokenEncoder("tokenizer.json", pattern, ranks_of(spec, tokenizer), reference)
        except NoFastPath:
            raise
        except Exception as error:
            raise NoFastPath(f"tiktoken does not take its ranks and pattern: {error}") from error
        texts = [normalize(text) for text in selftest_texts(tokens, names)]
        different = first_difference(encoder.encode_batch, reference, texts)
        if different is not None:
            raise NoFastPath(f"tiktoken gives other ids for {different[:20]!r}")
    except NoFastPath as reason:
        return None, f"tokenizers, batched ({' '.join(str(reason).split())})"
    return encoder, f"tiktoken with the ranks of tokenizer.json (identical ids on {len(texts)} self-test texts)"
