"""What a prompt may be."""

from __future__ import annotations

from megabyte_distill.alphabet import BOS_BYTE, PAD_BYTE


def prompt_bytes(prompt: str | bytes, name: str = "prompt") -> bytes:
    """The bytes of a prompt, text as UTF-8. Anything goes, an empty prompt and half a character too, but BOS and PAD.

    ValueError names the offset of the first byte that cannot be in a text.
    """
    try:
        encoded = prompt.encode("utf-8") if isinstance(prompt, str) else prompt
    except UnicodeEncodeError as error:
        raise ValueError(
            f"character {error.start} of the {name} is U+{ord(error.object[error.start]):04X}, half of a surrogate "
            "pair, which has no UTF-8; give the text as bytes or repair it"
        ) from error
    for offset, byte in enumerate(encoded):
        if byte in (BOS_BYTE, PAD_BYTE):
            raise ValueError(
                f"the {name} has byte {byte} (0x{byte:02X}) at offset {offset}; {BOS_BYTE} and {PAD_BYTE} mark "
                "document starts and padding and never occur in UTF-8: remove it"
            )
    return encoded
