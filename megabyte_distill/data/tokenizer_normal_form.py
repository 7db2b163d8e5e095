"""Whether a text is in a Unicode normal form already, at a fraction of the time that normalising takes."""

from __future__ import annotations

import functools
import re
import unicodedata
from typing import Literal, get_args

NormalForm = Literal["NFC", "NFD", "NFKC", "NFKD"]
NORMAL_FORMS: tuple[NormalForm, ...] = get_args(NormalForm)


def is_normal(text: str, form: NormalForm) -> bool:
    """True only where normalising to ``form`` changes nothing, in any version of Unicode.

    Characters that Python's Unicode does not know may normalise in a newer one: for those, and for all beyond plane 3,
    the answer is False.
    """
    if text.isascii():
        return True
    return _unknown().search(text) is None and unicodedata.is_normalized(form, text)


@functools.cache
def _unknown() -> re.Pattern[str]:
    """Any character that Python's Unicode has not assigned in planes 0 to 3, which is where text is."""
    known = [unicodedata.category(chr(code)) not in ("Cn", "Cs") for code in range(0x40000)] + [False]
    edges = [code for code in range(len(known)) if known[code] != (code > 0 and known[code - 1])]
    ranges = zip(edges[::2], edges[1::2], strict=True)
    return re.compile("[^" + "".join(f"\\U{first:08x}-\\U{end - 1:08x}" for first, end in ranges) + "]")
