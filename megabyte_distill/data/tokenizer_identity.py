"""Whether two tokenizers cut text alike, as one number."""

from __future__ import annotations

import hashlib
from typing import Any

import orjson

from megabyte_distill.data.token_bytes import TokenBytes


def identity_of(table: TokenBytes, **parts: Any) -> str:
    """sha256, in hexadecimal digits, of JSON-like ``parts`` and the ids of ``table`` that start and end a document.

    The order of keys does not count. What two files may say in two ways, such as a default, does.
    """
    whole = {**parts, "start_id": table.start_id, "end_of_text_id": table.end_of_text_id}
    return hashlib.sha256(orjson.dumps(whole, option=orjson.OPT_SORT_KEYS)).hexdigest()
