"""Fused operators, a file each: torch ops over the kernel library. ``FUSED_OPS`` is what can be put in place."""

from __future__ import annotations

from types import MappingProxyType

from megabyte_distill.kernels.dispatch import FusedOp
from megabyte_distill.kernels.fused import (
    byte_embedding,
    chunk_index,
    chunk_pooling,
    dechunk_residual,
    joint_cross_entropy,
    ngram_embedding,
    routing,
)

FUSED_OPS: MappingProxyType[str, FusedOp] = MappingProxyType(
    {
        "byte_embedding": byte_embedding.FUSED,
        "dechunk_residual": dechunk_residual.FUSED,
        "ngram_embedding": ngram_embedding.FUSED,
        "routing_probabilities": routing.FUSED,
        "boundary_bits": chunk_index.BITS,
        "chunk_index": chunk_index.INDEX,
        "chunk_pool": chunk_pooling.FUSED,
        "joint_cross_entropies": joint_cross_entropy.FUSED,
    }
)
"""Name of the function in ``kernels.ops`` → what replaces it. A new fused op is one file and one line here."""
