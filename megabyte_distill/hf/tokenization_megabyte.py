"""Text to UTF-8 bytes and back, as a transformers tokenizer."""

from __future__ import annotations

from typing import Any

from transformers import AddedToken, PreTrainedTokenizer

from megabyte_distill.alphabet import BOS_BYTE, BYTE_VOCAB, PAD_BYTE
from megabyte_distill.inference.prompts import prompt_bytes

BOS_MARKER, PAD_MARKER = "<|bos|>", "<|pad|>"
"""What BOS and PAD decode to. The same characters in a text are encoded as the bytes they are."""


class MegabyteTokenizer(PreTrainedTokenizer):  # type: ignore[misc]
    """The id of a byte is its value; BOS (254) stands in front unless ``add_bos_token`` is false; 255 pads.

    A token is one character, the byte's value as a code point. BOS is the end of a document as well, so it is the eos
    token. Bytes that are no UTF-8 decode to U+FFFD.
    """

    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012  transformers' declaration

    def __init__(
        self,
        bos_token: str | AddedToken = BOS_MARKER,
        eos_token: str | AddedToken = BOS_MARKER,
        pad_token: str | AddedToken = PAD_MARKER,
        add_bos_token: bool = True,
        **kwargs: Any,
    ) -> None:
        """``kwargs``: transformers' own (padding_side, model_max_length, …)."""
        self._added_tokens_decoder = {BOS_BYTE: _special(bos_token), PAD_BYTE: _special(pad_token)}
        self.add_bos_token = add_bos_token
        kwargs.setdefault("clean_up_tokenization_spaces", False)
        super().__init__(
            bos_token=bos_token, eos_token=eos_token, pad_token=pad_token, add_bos_token=add_bos_token, **kwargs
        )

    @property
    def vocab_size(self) -> int:
        """256."""
        return BYTE_VOCAB

    def get_vocab(self) -> dict[str, int]:
        """Token → id, the markers of BOS and PAD in their places."""
        return {self.convert_ids_to_tokens(byte): byte for byte in range(BYTE_VOCAB)}

    def tokenize(self, text: str, **kwargs: Any) -> list[str]:
        """One token a byte. Markers in a text are not looked for, whatever ``split_special_tokens`` says."""
        return [chr(byte) for byte in prompt_bytes(text, "text")]

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """BOS in front; a second text simply follows the first."""
        start = [BOS_BYTE] if self.add_bos_token else []
        return start + token_ids_0 + (token_ids_1 or [])

    def get_special_tokens_mask(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None, already_has_special_tokens: bool = False
    ) -> list[int]:
        """1 for BOS and PAD, 0 for bytes of text."""
        ids = token_ids_0 + (token_ids_1 or [])
        whole = ids if already_has_special_tokens else self.build_inputs_with_special_tokens(ids)
        return [int(byte in (BOS_BYTE, PAD_BYTE)) for byte in whole]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text of tokens."""
        joined = b"".join(bytes([ord(token)]) if len(token) == 1 else token.encode() for token in tokens)
        return joined.decode("utf-8", errors="replace")

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Nothing: the alphabet is fixed."""
        return ()

    def _convert_token_to_id(self, token: str) -> int | None:
        """None for what is no byte."""
        return ord(token) if len(token) == 1 and ord(token) < BYTE_VOCAB else None

    def _convert_id_to_token(self, index: int) -> str:
        if not 0 <= index < BYTE_VOCAB:
            raise ValueError(f"id {index} is no byte; expected 0 to {BYTE_VOCAB - 1}")
        return chr(index)


def _special(token: str | AddedToken) -> AddedToken:
    return token if isinstance(token, AddedToken) else AddedToken(token, special=True, normalized=False)
