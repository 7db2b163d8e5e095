"""Seeded bugs in routing, chunk index, pooling, cross-entropy and n-grams, with the checks that must notice them."""

from __future__ import annotations

import torch
from torch import Tensor

from megabyte_distill.config.model import ChunkPooling
from megabyte_distill.kernels import ops, reference
from megabyte_distill.kernels.chunk_index import index_chunks
from megabyte_distill.kernels.library import Library
from tests.kernels import test_fused_chunk_index as chunk_index
from tests.kernels import test_fused_chunk_pooling as pooling
from tests.kernels import test_fused_joint_cross_entropy as cross_entropy
from tests.kernels import test_fused_ngram_embedding as ngrams
from tests.kernels.comparison import assert_agrees, assert_same_in_any_order
from tests.kernels.mutants import Check, Mutant
from tests.kernels.packed import offsets, some_bits


def routing_agrees(library: Library) -> None:
    """F2 over many documents, so that their edges take several steps to find."""
    cu_seqlens = offsets((3, 1, 2) * 20)
    assert_agrees(
        lambda q, k: ops.routing_probabilities(q, k, cu_seqlens),
        lambda q, k: reference.routing_probabilities(q, k, cu_seqlens),
        [torch.randn(120, 264), torch.randn(120, 264)],
        torch.randn(120),
    )


def index_agrees(library: Library) -> None:
    """The chunk index over three tiles, and the same in any order."""
    cu_seqlens = offsets((1, 3000, 2, 1500))
    for bits in (some_bits(cu_seqlens, 0.2), some_bits(cu_seqlens, 0.01, closed=False)):
        chunk_index.assert_index_is_torchs(bits, cu_seqlens, 64)
        assert_same_in_any_order(library, lambda bits=bits: list(ops.chunk_index(bits, cu_seqlens, 64))[:5])  # type: ignore[misc]


def pooling_agrees(kind: ChunkPooling) -> Check:
    """F3 with ties and with bytes in no chunk."""

    def check(library: Library) -> None:
        cu_seqlens = offsets((40, 3, 57, 25))
        bits = some_bits(cu_seqlens, 0.2, closed=False)
        bits[:50:7], bits[110:] = True, False
        index = index_chunks(bits, cu_seqlens, 4)
        assert_agrees(
            lambda r: pooling.pool(r, index, kind),
            lambda r: pooling.padded_definition(r, bits, cu_seqlens, index, kind),
            [torch.randint(-2, 3, (125, 16)).float()],
            torch.randn(index.ends.shape[0], 16),
        )

    return check


def cross_entropy_agrees(library: Library) -> None:
    """F5 with both targets."""
    labels, distribution = cross_entropy.some_labels(30), cross_entropy.some_distribution(30)

    def definition(logits: Tensor) -> Tensor:
        hard = reference.joint_cross_entropy(logits, labels)
        return hard + reference.joint_cross_entropy(logits, distribution.to(logits.dtype))

    assert_agrees(
        lambda logits: torch.stack(ops.joint_cross_entropies(logits, labels, distribution)).sum(0),
        definition,
        [cross_entropy.some_logits(30, torch.float32) * 20],
        torch.randn(30),
    )


def ngrams_agree(library: Library) -> None:
    """F1's n-gram tables; the byte table's gradient is another file's."""
    _ngrams_agree(*ngrams.reads(50, 6))


def ngram_runs_agree(library: Library) -> None:
    """A row's places end with a piece of the order."""
    indices = torch.full((129, 1), 5)
    indices[-1] = 9
    _ngrams_agree(torch.zeros(129, dtype=torch.int64), indices)


def _ngrams_agree(byte_ids: Tensor, indices: Tensor) -> None:
    table, ngram_table = ngrams.tables_of(40, torch.float32)
    assert_agrees(
        lambda own: ops.ngram_embedding(byte_ids, indices, table, own),
        lambda own: reference.ngram_embedding(byte_ids, indices, table.to(own.dtype), own),
        [ngram_table],
        torch.randn(byte_ids.shape[0], 40),
    )


def _mutant(file: str, old: str, new: str, check: Check) -> Mutant:
    return Mutant(source=file, file=file, old=old, new=new, check=check)


MUTANTS: dict[str, Mutant] = {
    "the byte's own k instead of the next one's": _mutant(
        "routing.cu", "*row_k = k + (t + 1) * width;", "*row_k = k + t * width;", routing_agrees
    ),
    "a document's end missed by the search": _mutant(
        "routing.cu", "size = min(step, size", "size = min(step - 1, size", routing_agrees
    ),
    "a scan of tiles without its barrier": _mutant(
        "chunk_index.cu",
        "if (lane == 31) shared[warp] = inclusive;\n  __syncthreads();",
        "if (lane == 31) shared[warp] = inclusive;",
        index_agrees,
    ),
    "a scan that overwrites what the one before still reads": _mutant(
        "chunk_index.cu", "  __syncthreads();  // an earlier call may still be reading\n", "", index_agrees
    ),
    "an end at a document's first byte taken for the last document's": _mutant(
        "chunk_index.cu", "seen.last < segment_start ? -1", "seen.last <= segment_start ? -1", index_agrees
    ),
    "a chunk without its last byte": _mutant(
        "chunk_pooling.cu",
        "if (t + u > end) break;",
        "if (t + u >= end) break;",
        pooling_agrees(ChunkPooling.MEAN_LAST),
    ),
    "the last of several maxima": _mutant(
        "chunk_pooling.cu", "x > result[i]", "x >= result[i]", pooling_agrees(ChunkPooling.MAX)
    ),
    "gradients for bytes in no chunk": _mutant(
        "chunk_pooling.cu", "if (t >= begin && t < bytes) {", "if (t < bytes) {", pooling_agrees(ChunkPooling.MEAN_LAST)
    ),
    "the largest logit of half a warp": _mutant(
        "joint_cross_entropy.cu", "for (int offset = 16;", "for (int offset = 8;", cross_entropy_agrees
    ),
    "target distributions taken to sum to one": _mutant(
        "joint_cross_entropy.cu", "fmaf(on_soft, warp_sum(sum), on_hard)", "on_soft + on_hard", cross_entropy_agrees
    ),
    "a run that goes on behind its piece stored as the whole": _mutant(
        "ngram_embedding.cu", "if (current == before || current == behind)", "if (current == before)", ngrams_agree
    ),
    "the parts of a row from the wrong slots": _mutant(
        "ngram_embedding.cu", "(at * 2 + (at == first))", "(at * 2 + (at != first))", ngrams_agree
    ),
    "a piece's last row stored without the places behind": _mutant(
        "ngram_embedding.cu", "(ends - 1) / kPiece", "ends / kPiece", ngram_runs_agree
    ),
}
"""What is wrong → the change."""
