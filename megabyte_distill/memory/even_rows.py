"""A micro-batch of rows full of text cut into even chunks, and a vocabulary to go with it: shapes, not meaning."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from megabyte_distill.alphabet import BOS_BYTE
from megabyte_distill.config.stage import StageConfig
from megabyte_distill.data.packing import PackedRow
from megabyte_distill.data.stored_targets import StoredTargets
from megabyte_distill.data.token_bytes import TokenBytes

LETTER = ord("a")
STORED_PAIRS = 32
"""Of a byte in a target cache, at most, unless --logits-save-top-k was given to it."""


def even_row(config: StageConfig, bytes_per_chunk: float) -> PackedRow:
    """The stage's micro-batch: each row one document of ``seq_length`` bytes, a token end every so many bytes.

    Where the stage merges tokens, its chunks are as long as where they are shortest.
    ValueError for fewer than one byte a chunk.
    """
    if bytes_per_chunk < 1:
        raise ValueError(f"--bytes-per-chunk {bytes_per_chunk}: a chunk has at least one byte")
    size, rows = config.seq_length, config.micro_batch_size
    token_bits, bits = _even_bits(size, bytes_per_chunk), _even_bits(size, _shortest(config, bytes_per_chunk))
    is_merged = int(bits.sum()) < int(token_bits.sum())
    in_row = int(token_bits.sum())
    chunks = in_row * rows
    capacity = -(-chunks // config.chunk_bucket) * config.chunk_bucket
    byte_ids = torch.full((size,), LETTER)
    byte_ids[0] = BOS_BYTE
    byte_ids = byte_ids.repeat(rows)
    offsets = [row * in_row for row in range(rows + 1)] + ([capacity] if capacity > chunks else [])
    nothing = torch.zeros(capacity, dtype=torch.int64)
    return PackedRow(
        byte_ids=byte_ids,
        bits=bits.repeat(rows),
        labels=torch.full((size * rows,), LETTER),
        is_real=torch.ones(size * rows, dtype=torch.bool),
        tokens=nothing,
        token_labels=nothing,
        token_mask=torch.arange(capacity) < chunks,
        token_ends_document=torch.zeros(capacity, dtype=torch.bool),
        cu_seqlens=torch.arange(rows + 1, dtype=torch.int32) * size,
        cu_chunks=torch.tensor(offsets, dtype=torch.int32),
        chunk_bucket=config.chunk_bucket,
        documents=(-1,) * rows,
        stored=None if config.logits_load_dir is None else _even_targets(size * rows),
        token_bits=token_bits.repeat(rows) if is_merged else None,
        forced_ends=torch.zeros(size * rows, dtype=torch.bool) if is_merged else None,
    )


def _even_bits(size: int, bytes_per_chunk: float) -> Tensor:
    bits = torch.zeros(size, dtype=torch.bool)
    bits[(torch.arange(int(size / bytes_per_chunk) + 1) * bytes_per_chunk).long().clamp(max=size - 1)] = True
    return bits


def _shortest(config: StageConfig, bytes_per_token: float) -> float:
    """Bytes of a chunk where the stage's chunks are shortest, and memory is largest."""
    target, start = config.target_bytes_per_chunk, config.target_bytes_per_chunk_start
    if target is None:
        return bytes_per_token
    first = target if not config.target_bytes_per_chunk_iters else bytes_per_token if start is None else start
    return max(bytes_per_token, min(first, target))


def _even_targets(size: int) -> StoredTargets:
    """Full ones, of the default size of a cache."""
    return StoredTargets(
        counts=torch.full((size,), STORED_PAIRS, dtype=torch.int32),
        tail=torch.ones(size, dtype=torch.float16),
        classes=torch.arange(STORED_PAIRS, dtype=torch.int16).repeat(size),
        probabilities=torch.ones(size * STORED_PAIRS, dtype=torch.float16),
    )


@cache
def even_tokens(vocab_size: int) -> TokenBytes:
    """A vocabulary of that size whose tokens are distinct: numbers written in letters."""
    tokens: list[bytes | None] = [bytes(_letters(number)) for number in range(vocab_size)]
    return TokenBytes.from_list(tokens, end_of_text_id=0, bos_id=None)


def _letters(number: int) -> list[int]:
    digits = [LETTER + number % 26]
    while number >= 26:
        number //= 26
        digits.append(LETTER + number % 26)
    return digits
