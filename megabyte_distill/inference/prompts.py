"""What a prompt may be, and how long."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate
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


def checked_prompts(prompts: Sequence[str | bytes], names: Sequence[str] | None = None) -> list[bytes]:
    """The bytes of each prompt (:func:`prompt_bytes`); ValueError names the one that is none, or says that none is.

    ``names``: what messages call them (default: :func:`prompt_names`).
    """
    if isinstance(prompts, str | bytes):
        raise ValueError("prompts is one text, whose letters would be read as prompts; put it into a list")
    if not prompts:
        raise ValueError("no prompts; expected at least one, which may be empty")
    names = names or prompt_names(len(prompts))
    return [prompt_bytes(prompt, name) for prompt, name in zip(prompts, names, strict=True)]


def context_limit(student: nn.Module) -> int | None:
    """Chunks that the backbone was made for (the teacher's max_position_embeddings), BOS's counted; None: unknown."""
    config = getattr(student.backbone, "backbone_config", None)
    return None if config is None else int(config.max_position_embeddings)


def refuse_too_long(prompt_bits: Sequence[Sequence[bool]], limit: int, names: Sequence[str]) -> None:
    """ValueError where the bits of a prompt's bytes end more chunks than ``limit``, BOS's counted."""
    for name, bits in zip(names, prompt_bits, strict=True):
        fitting = fitting_bytes(bits, limit)
        if fitting < len(bits):
            raise too_long(name, len(bits), fitting, limit)


def fitting_bytes(bits: Iterable[bool], limit: int) -> int:
    """How many of the bytes whose bits these are come before there are more chunks than ``limit``, BOS's counted."""
    return sum(chunks <= limit for chunks in accumulate(bits, initial=1)) - 1


def too_long(name: str, size: int, fitting: int, limit: int, unit: str = "chunk") -> ValueError:
    """The error for a prompt of ``size`` bytes, of which the first ``fitting`` take all ``limit`` positions.

    ``unit``: what takes one.
    """
    return ValueError(
        f"the {name} is too long: it has {size} bytes, and the first {fitting} of them fill the {limit} positions of "
        f"the backbone (max_position_embeddings; each {unit} takes one, and BOS does); give it fewer than these, new "
        f"{unit}s need positions too"
    )


def prompt_name(number: int, count: int) -> str:
    """What messages and labels call one of so many prompts, ``number`` from 0: they count from 1."""
    return "prompt" if count == 1 else f"prompt {number + 1} of {count}"


def prompt_names(count: int) -> list[str]:
    """:func:`prompt_name` of so many prompts, all of them."""
    return [prompt_name(number, count) for number in range(count)]
