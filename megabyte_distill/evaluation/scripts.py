"""Ten scripts: prompts in them, and whether what follows is UTF-8."""

from __future__ import annotations

import codecs

SCRIPT_PROMPTS = {
    "Latin": "The house stood on a hill and",
    "Greek": "Το σπίτι ήταν πάνω στον λόφο και",
    "Cyrillic": "Дом стоял на холме, и",
    "Arabic": "كان البيت على التل و",
    "Hebrew": "הבית עמד על הגבעה ו",
    "Devanagari": "घर पहाड़ी पर था और",
    "Thai": "บ้านอยู่บนเนินเขาและ",
    "Han": "房子在山上,",
    "Kana": "いえは おかの うえに あって、",
    "Hangul": "집은 언덕 위에 있었고",
}
"""Script → a sentence that is begun: the house stood on a hill and …"""


def is_valid_utf8(text: bytes) -> bool:
    """True where the text is UTF-8; a character that only its end leaves open is forgiven."""
    try:
        codecs.getincrementaldecoder("utf-8")("strict").decode(text, final=False)
    except UnicodeDecodeError:
        return False
    return True


def invalid_bytes(text: bytes) -> int:
    """How many bytes are in no character; those of one that only the end leaves open are forgiven."""
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    return sum("\udc80" <= character <= "\udcff" for character in decoder.decode(text, final=False))
