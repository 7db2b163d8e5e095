"""A SentencePiece .model, run without its dummy prefix."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import sentencepiece
from numpy.typing import NDArray

from megabyte_distill.data.tokenizer_identity import identity_of
from megabyte_distill.data.tokenizer_ids import SpecialIds
from megabyte_distill.data.tokenizer_selftest import selftest_texts
from megabyte_distill.data.tokenizers import TokenizerKind

_SPACE_MARK = "▁"
_NORMALIZATION_PASSES = 8
# ModelProto.normalizer_spec (field 3) with add_dummy_prefix (field 3) false. Parsers merge a message that comes twice,
# the later value wins, so the bytes can simply be appended to the serialised model.
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


class SentencePieceTokenizer:
    """See :class:`megabyte_distill.data.tokenizers.DocumentTokenizer`.

    With a dummy prefix the token of a lone space mark would stand for zero bytes at the start of a document.
    """

    kind = TokenizerKind.SENTENCEPIECE
    encoder = "sentencepiece, batched"

    def __init__(self, path: Path, ids: SpecialIds) -> None:
        """ValueError where the file is no SentencePiece model."""
        self.path = path
        try:
            model = path.read_bytes()
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model + _NO_DUMMY_PREFIX)
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{path}: neither a SentencePiece model nor another known tokenizer ({error})") from error
        processor = self._processor
        if not processor.vocab_size():
            raise ValueError(f"{path}: neither a SentencePiece model nor another known tokenizer (no pieces)")
        tokens = [self._piece_bytes(index) for index in range(processor.vocab_size())]
        names = {processor.id_to_piece(index): index for index, token in enumerate(tokens) if token is None}
        end, bos = processor.eos_id(), processor.bos_id()
        own_ids = SpecialIds(
            end_of_text=end if ids.end_of_text is None and end >= 0 else ids.end_of_text,
            bos=bos if not ids.bos_is_known and bos >= 0 else ids.bos,
            bos_is_known=True,
            vocab_size=ids.vocab_size,
        )
        self.token_bytes = own_ids.table(tokens, names, path)
        self.segmentation_hash = identity_of(self.token_bytes, kind=self.kind, model=hashlib.sha256(model).hexdigest())
        self._changes_text = _changes_text(model) or any(map(self._is_changed, selftest_texts(tokens)))

    def _piece_bytes(self, index: int) -> bytes | None:
        processor = self._processor
        if processor.is_control(index) or processor.is_unknown(index) or processor.is_unused(index):
            return None
        piece: str = processor.id_to_piece(index)
        if processor.is_byte(index):
            return bytes([int(piece[3:5], 16)])  # <0x41>
        return piece.replace(_SPACE_MARK, " ").encode()

    def normalize(self, text: str) -> str:
        """The model's own normalisation; a literal U+2581 is read as a space, so the document has a space there.

        Some rules make work for others (a removed character lets its neighbours compose), hence until nothing changes.
        """
        text = text.replace(_SPACE_MARK, " ")
        for _ in range(_NORMALIZATION_PASSES if self._changes_text else 0):
            before, text = text, self._normalized(text)
            if text == before:
                break
        return text

    def _normalized(self, text: str) -> str:
        return str(self._processor.normalize(text)).replace(_SPACE_MARK, " ")

    def _is_changed(self, text: str) -> bool:
        text = text.replace(_SPACE_MARK, " ")
        return self._normalized(text) != text

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """Tokens of each text, int32 [T]."""
        return [np.array(ids, dtype=np.int32) for ids in self._processor.encode(list(texts), out_type=int)]

    def encode_batch_reference(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """Tokens of each text, int32 [T]; there is one encoder only."""
        return self.encode_batch(texts)


def _changes_text(model: bytes) -> bool:
    """False where a serialised model has neither normalisation rules nor drops spaces, as Llama's and Mistral's."""
    rules, drops_spaces = b"", True
    for number, value in _fields(model):
        if number == 3 and isinstance(value, bytes):  # ModelProto.normalizer_spec
            for inner, content in _fields(value):
                if inner == 2 and isinstance(content, bytes):  # precompiled_charsmap
                    rules = content
                elif inner == 4:  # remove_extra_whitespaces
                    drops_spaces = bool(content)
    return bool(rules) or drops_spaces


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Field numbers and values of a protocol buffer that its own library has read already."""
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = message[position]
            position += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while position < len(message):
        key = varint()
        number, wire = key >> 3, key & 7
        if wire == 0:
            yield number, varint()
            continue
        size = varint() if wire == 2 else 8 if wire == 1 else 4
        yield number, message[position : position + size]
        position += size
