"""Texts on which two encoders of one tokenizer must agree before the faster one is used."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Encode = Callable[[Sequence[str]], list[NDArray[np.int32]]]
_MaybeEncode = Callable[[Sequence[str]], Sequence[NDArray[np.int32] | None]]

_PIECES = (
    "The house stood on the hill, and the wind went round the house.",
    "日本語の文章です。東京は日本の首都です。「カタカナ」と漢字、ｶﾅ。",
    "한국어 문장입니다. 中文句子，没有空格。繁體字！",
    "مرحبا بالعالم، كيف حالك اليوم؟ ١٢٣٤٥ مُحَمَّد",
    "שלום עולם. Здравствуй, мир! Ναί, Ελλάδα. Ünïcödé straße ǆ ŉ",
    "हिन्दी में एक वाक्य। १२३४ ภาษาไทยไม่มีช่องว่าง தமிழ் မြန်မာ",
    "👩‍👩‍👧‍👦 🙂🇯🇵 👍🏽 ❤️ 🏴󠁧󠁢󠁳󠁣󠁴󠁿 #️⃣",
    "cafe\u0301 e\u0301\u0327 \u0301 lone, ﬁ ﬆ ligature, x\u0338 a\u200db \u200bzero\ufeff width\u00ad",
    "def main(argv):\n    return {'a': argv[::-1]}  # 'tis\n\n\n\tif x!=y and not z: pass\r\n",
    '<div class="a">&nbsp;</div>\n\n\n/* c */ a->b; x::y<T>(); // http://a.b/c?d=e&f=%20\r\n\r\n\n',
    "0 12 345 6789 12345678901234567890 3.14 1,000,000 ½ ² Ⅷ ٣ 一二 \u0bf0 0x1F",
    "I'm you're he'S we'LL they'Ve I'D don't 'Tis '\u017f '\u017ft 'RE'll ''s ’s '\u212a",
    "iPhone McDonald HTTPServer camelCaseWord SNAKE_CASE aB Ab ABc",
    "<|endoftext|><|begin_of_text|><|im_start|><tool_call></s><s><unk>[INST]<0x41>▁",
    "\0 \x01\x02\x07\x08\x0b\x0c\x1b\x1f\x7f\x80\x85\xa0 \u1680\u2000\u2028\u2029\u202f\u205f\u3000 \u180e",
    "!!!???...---===___***###~~~ ,,, ;; :: (()) [[]] {{}} «» “” — – …",
    "\ue000 \uffff\ufffd \U0001e900\U0001e943 \U00016d40 \U000105c9 \u0378 \U0003134b \U000f0000 \U0010ffff",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
)
_JOINTS = ("", " ", "  ", "\n", "\n\n", " \n ", "\t", "\r\n", "    ", "\u3000", "\xa0", "'", "1", "\0", "\n  \n", "x")
_RUNS = tuple(
    before + character * count + after
    for character in (" ", "\n", "\t", "\r\n", " \n", "\u3000", "0", "-", "é", "字")
    for count in (2, 3, 7, 16, 83, 300)
    for before, after in (("", ""), ("a", "b"), ("\n", "\n"))
)
_MIXTURES = 40
_SAMPLED_TOKENS = 300


def selftest_texts(tokens: Sequence[bytes | None], names: Sequence[str] = ()) -> list[str]:
    """Fixed and mixed awkward texts, the names of special and added tokens, and a sample of the vocabulary.

    ``tokens`` are the vocabulary's bytes by id; those that are no text by themselves are left out.
    """
    choose = random.Random(0)
    mixtures = [
        "".join(
            choose.choice(_PIECES)[choose.randrange(20) :] + choose.choice(_JOINTS)
            for _ in range(choose.randrange(2, 7))
        )
        for _ in range(_MIXTURES)
    ]
    sample = []
    for token in tokens[:: max(1, len(tokens) // _SAMPLED_TOKENS)]:
        try:
            sample.append((token or b"").decode())
        except UnicodeDecodeError:
            continue
    marked = [f"a{name} b" for name in names] + ["".join(names)]
    return ["", *_PIECES, *_RUNS, *mixtures, *marked, *(text for text in sample if text), " ".join(sample)]


def first_difference(encode: _MaybeEncode, reference: Encode, texts: Sequence[str]) -> str | None:
    """The first text of which the two give different ids, None where there is none; no answer is a difference."""
    pairs = zip(texts, encode(texts), reference(texts), strict=True)
    return next((text for text, ours, theirs in pairs if ours is None or not np.array_equal(ours, theirs)), None)
