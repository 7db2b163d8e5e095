"""What a prompt may be, and how long."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from megabyte_distill.alphabet import BOS_BYTE, PAD_BYTE

if TYPE_CHECKING:
    from torch import nn


PATH_WINDOW = 256
"""Bytes at a prompt's end that are read along the paths (prompt_reading.py)."""


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


def checked_prompts(prompts: Sequence[str | bytes]) -> list[bytes]:
    """The bytes of each prompt (:func:`prompt_bytes`); ValueError names the one that is none, or says that none is."""
    if isinstance(prompts, str | bytes):
        raise ValueError("prompts is one text, whose letters would be read as prompts; put it into a list")
    if not prompts:
        raise ValueError("no prompts; expected at least one, which may be empty")
    return [prompt_bytes(prompt, prompt_name(number, len(prompts))) for number, prompt in enumerate(prompts)]


def context_limit(student: nn.Module) -> int | None:
    """Chunks that the backbone was made for (the teacher's max_position_embeddings), BOS's counted; None: unknown."""
    config = getattr(student.backbone, "backbone_config", None)
    return None if config is None else int(config.max_position_embeddings)


def refuse_too_long(
    chunks: Sequence[int], sizes: Sequence[int], limit: int, names: Sequence[str] | None = None
) -> None:
    """ValueError where the first ``sizes`` [R] bytes of a prompt are cut into more chunks [R] than ``limit``.

    ``names``: what the prompts are called, where these are not all there are.
    """
    names = names or [prompt_name(number, len(chunks)) for number in range(len(chunks))]
    for name, count, size in zip(names, chunks, sizes, strict=True):
        if count > limit:
            raise ValueError(
                f"the {name} is too long: its first {size} bytes are {count} chunks with BOS, "
                f"and the backbone has {limit} positions (max_position_embeddings); shorten it"
            )


def prompt_name(number: int, count: int) -> str:
    """What messages call one of so many prompts."""
    return "prompt" if count == 1 else f"prompt {number}"
