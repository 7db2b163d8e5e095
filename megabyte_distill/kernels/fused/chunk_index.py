"""F2's second half: boundary bits, and the chunks that bits make, without a host sync but one (csrc/chunk_index.cu)."""

from __future__ import annotations

import torch
from torch import Tensor

from megabyte_distill.kernels.chunk_index import ChunkIndex
from megabyte_distill.kernels.dispatch import FusedOp
from megabyte_distill.kernels.fused.arguments import form_refusal
from megabyte_distill.kernels.library import library_for, prepared

_TILE = 2048
"""Bytes of the row that one block scans (kTile)."""
_NO_BYTE = -1


def fused_boundary_bits(
    p: Tensor, byte_ids: Tensor, is_text: Tensor | None = None, threshold: float = 0.5, start_byte: int | None = None
) -> Tensor:
    """``ops.boundary_bits`` in one launch."""
    start = _NO_BYTE if start_byte is None else start_byte
    bits: Tensor = torch.ops.megabyte.boundary_bits(p.detach(), byte_ids, is_text, threshold, start)
    return bits


def bits_refusal(p: Tensor, byte_ids: Tensor, is_text: Tensor | None = None) -> str | None:
    """Why the kernel cannot take these, or None."""
    shape = (p.shape[0],)
    return (
        form_refusal("p", p, shape, torch.float32)
        or form_refusal("byte_ids", byte_ids, shape, torch.int64)
        or form_refusal("is_text", is_text, shape, torch.bool)
    )


def fused_chunk_index(bits: Tensor, cu_seqlens: Tensor, bucket: int) -> ChunkIndex:
    """``ops.chunk_index`` in two launches; the number of chunks is all that comes to the host."""
    ends, begins, chunk_of_byte, cu_chunks, starts, count = torch.ops.megabyte.chunk_index(bits, cu_seqlens, bucket)
    num_chunks = int(count)
    padded = -(-num_chunks // bucket) * bucket
    edges = cu_seqlens.shape[0] + int(padded > num_chunks)
    return ChunkIndex(ends[:padded], begins[:padded], chunk_of_byte, cu_chunks[:edges], starts[:padded], num_chunks)


def index_refusal(bits: Tensor, cu_seqlens: Tensor) -> str | None:
    """Why the kernel cannot take these, or None."""
    return form_refusal("bits", bits, (bits.shape[0],), torch.bool)


BITS = FusedOp(run=fused_boundary_bits, refusal=bits_refusal, limits="p in fp32")
INDEX = FusedOp(run=fused_chunk_index, refusal=index_refusal, limits="every row")


@torch.library.custom_op("megabyte::boundary_bits", mutates_args=())
def _bits(p: Tensor, byte_ids: Tensor, is_text: Tensor | None, threshold: float, start_byte: int) -> Tensor:
    """[P] bool."""
    bits = torch.empty(p.shape, dtype=torch.bool, device=p.device)
    library_for(p).call(
        "boundary_bits",
        prepared(p),
        prepared(byte_ids),
        None if is_text is None else prepared(is_text),
        bits,
        p.shape[0],
        threshold,
        start_byte,
    )
    return bits


@_bits.register_fake
def _(p: Tensor, byte_ids: Tensor, is_text: Tensor | None, threshold: float, start_byte: int) -> Tensor:
    return torch.empty_like(p, dtype=torch.bool)


@torch.library.custom_op("megabyte::chunk_index", mutates_args=())
def _index(bits: Tensor, cu_seqlens: Tensor, bucket: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """ends, begins, chunk_of_byte [P], cu_chunks [S + 2], starts, count [1]; there is room for P chunks."""
    outputs = _room(bits, cu_seqlens, bucket)
    size = bits.shape[0]
    if size == 0:
        return tuple(output.zero_() for output in outputs)  # type: ignore[return-value]
    work = torch.empty(2 * -(-size // _TILE), dtype=torch.int64, device=bits.device)
    library_for(bits).call(
        "chunk_index",
        prepared(bits),
        prepared(cu_seqlens.to(torch.int32)),
        work,
        *outputs,
        size,
        cu_seqlens.shape[0] - 1,
        bucket,
        outputs[0].shape[0],
    )
    return outputs


@_index.register_fake
def _(bits: Tensor, cu_seqlens: Tensor, bucket: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _room(bits, cu_seqlens, bucket)


def _room(bits: Tensor, cu_seqlens: Tensor, bucket: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    size, device = bits.shape[0], bits.device
    capacity = -(-size // bucket) * bucket
    return (
        torch.empty(capacity, dtype=torch.int64, device=device),
        torch.empty(capacity, dtype=torch.int64, device=device),
        torch.empty(size, dtype=torch.int64, device=device),
        torch.empty(cu_seqlens.shape[0] + 1, dtype=torch.int32, device=device),
        torch.empty(capacity, dtype=torch.bool, device=device),
        torch.empty(1, dtype=torch.int64, device=device),
    )
