"""A kernel reads addresses alone: whatever has another shape or dtype than it takes it for is refused before."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megabyte_distill.config.model import ChunkPooling, DechunkMode
from megabyte_distill.kernels import dispatch, ops
from megabyte_distill.kernels.fused import FUSED_OPS
from megabyte_distill.kernels.library import Library, calls

P, E = 6, 16
IDS, WHOLE = torch.arange(P), torch.tensor([0, P], dtype=torch.int32)
TABLE, ROWS, SHORT = torch.zeros(256, E), torch.zeros(P, E), torch.zeros(2, E)
ENDS, STARTS = torch.tensor([1, 5]), torch.tensor([True, False])
PROBABILITIES = torch.full((P,), 0.5)


def dechunked(p: Tensor, confidence: Tensor, residual: Tensor, ends: Tensor = ENDS) -> Tensor:
    return ops.dechunk_residual(
        SHORT, p, confidence, residual, ends=ends, chunk_of_byte=IDS // 3, starts=STARTS, mode=DechunkMode.HARD
    )


WRONG: dict[str, tuple[Callable[[], object], str]] = {
    "ids of 32 bits": (lambda: ops.byte_embedding(IDS.int(), TABLE), r"byte_ids of int32 \[6\], expected int64 \[6\]"),
    "raw bytes": (lambda: ops.byte_embedding(IDS.byte(), TABLE), "byte_ids of uint8"),
    "ids of two rows": (lambda: ops.byte_embedding(IDS.view(2, 3), TABLE), r"byte_ids of int64 \[2, 3\]"),
    "few states": (
        lambda: ops.byte_embedding(IDS, TABLE, SHORT),
        r"added of float32 \[2, 16\], expected .* \[6",
    ),
    "a short norm": (lambda: ops.byte_embedding(IDS, TABLE, None, torch.zeros(8)), r"norm_weight of float32 \[8\]"),
    "a narrow n-gram table": (
        lambda: ops.ngram_embedding(IDS, IDS[:, None], TABLE, torch.zeros(256, 8)),
        r"ngram_table of float32 \[256, 8\]",
    ),
    "n-grams of other bytes": (lambda: ops.ngram_embedding(IDS, IDS[:2, None], TABLE, TABLE), r"indices of int64 \[2,"),
    "too few keys": (lambda: ops.routing_probabilities(ROWS, SHORT, WHOLE), r"k of float32 \[2, 16\]"),
    "ends of 32 bits": (
        lambda: ops.chunk_pool(ROWS, ENDS, ENDS.int(), 2, ChunkPooling.LAST),
        r"ends of int32 \[2\], expected int64",
    ),
    "a mask of numbers": (lambda: ops.boundary_bits(PROBABILITIES, IDS, IDS), "is_text of int64"),
    "bits of numbers": (lambda: ops.chunk_index(IDS, WHOLE, 1), r"bits of int64 \[6\], expected bool"),
    "a short residual": (lambda: dechunked(PROBABILITIES, PROBABILITIES, SHORT), r"residual of float32 \[2, 16\]"),
    "confidence of other bytes": (lambda: dechunked(PROBABILITIES, PROBABILITIES[:2], ROWS), r"confidence of .*\[2\]"),
    "fewer ends than states": (
        lambda: dechunked(PROBABILITIES, PROBABILITIES, ROWS, ENDS[:1]),
        r"ends of int64 \[1\], expected int64 \[2\]",
    ),
    "too few labels": (lambda: ops.joint_cross_entropy(torch.zeros(P, 512), IDS[:2]), r"labels of int64 \[2\]"),
    "too few targets": (
        lambda: ops.joint_cross_entropy(torch.zeros(P, 512), torch.zeros(1, 512)),
        r"distribution of float32 \[1, 512\]",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_a_kernel_would_misread_is_refused(fused: Library, what: str) -> None:
    run, message = WRONG[what]
    before = calls.copy()
    with pytest.raises(ValueError, match=message):
        run()
    assert calls == before


def test_where_fused_is_not_demanded_torch_takes_them(cpu_library: Library) -> None:
    dispatch.install(FUSED_OPS, device="cpu")
    try:
        table, before = torch.randn(256, E), calls.copy()
        assert torch.equal(ops.byte_embedding(IDS.int(), table), table[:P])
        with pytest.raises(RuntimeError, match="size of tensor"):
            ops.byte_embedding(IDS, table, SHORT)
        assert calls == before
    finally:
        dispatch.install({})
