"""Dechunking in its three modes against the loop over bytes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megabyte_distill.config.model import DechunkMode
from megabyte_distill.kernels import ops, reference
from megabyte_distill.model.chunking import ChunkLayout, chunk_layout

MODES = list(DechunkMode)
LENGTHS = (1, 5, 1, 63, 200, 2, 128)


def packed_bits(mode: DechunkMode, density: float = 0.3) -> tuple[Tensor, Tensor]:
    """Random bits [P] with a segment's last byte an end, its first one too except in the official way; cu_seqlens."""
    cu_seqlens = torch.tensor((0, *LENGTHS), dtype=torch.int32).cumsum(0).to(torch.int32)
    bits = torch.rand(int(cu_seqlens[-1])) < density
    if mode is not DechunkMode.OFFICIAL:
        bits[cu_seqlens[:-1].long()] = True
    bits[cu_seqlens[1:].long() - 1] = True
    return bits, cu_seqlens


def run_op(h: Tensor, p: Tensor, layout: ChunkLayout, mode: DechunkMode, null_group: Tensor | None) -> Tensor:
    return ops.dechunk(
        h,
        p,
        ends=layout.ends,
        chunk_of_byte=layout.chunk_of_byte,
        starts=layout.starts,
        mode=mode,
        null_group=null_group,
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("probabilities", ["uniform", "tiny", "saturated"])
def test_op_equals_loop_in_values_and_gradients(mode: DechunkMode, probabilities: str) -> None:
    bits, cu_seqlens = packed_bits(mode)
    layout = chunk_layout(bits, cu_seqlens, bucket=8)
    p = torch.rand(bits.shape[0], dtype=torch.float64)
    p = {"uniform": p, "tiny": p * 1e-3, "saturated": (p > 0.5).double()}[probabilities]
    h = torch.randn(layout.ends.shape[0], 6, dtype=torch.float64)
    null_group = torch.randn(6, dtype=torch.float64)
    weight = torch.randn(bits.shape[0], 6, dtype=torch.float64)
    results = []
    for fast in (True, False):
        leaves = [value.clone().requires_grad_() for value in (h, p, null_group)]
        if fast:
            s = run_op(leaves[0], leaves[1], layout, mode, leaves[2])
        else:
            s = reference.dechunk(leaves[0], leaves[1], bits, cu_seqlens, mode, leaves[2])
        grads = torch.autograd.grad((s * weight).sum(), leaves, allow_unused=True, materialize_grads=True)
        results.append((s.detach(), *grads))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("mode", MODES)
def test_fp32_is_exact_to_1e_5(mode: DechunkMode) -> None:
    bits, cu_seqlens = packed_bits(mode, density=0.7)
    layout = chunk_layout(bits, cu_seqlens, bucket=1)
    p, h, null_group = torch.rand(bits.shape[0]), torch.randn(layout.num_chunks, 16), torch.randn(16)
    expected = reference.dechunk(h.double(), p.double(), bits, cu_seqlens, mode, null_group.double())
    torch.testing.assert_close(run_op(h, p, layout, mode, null_group).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_bf16_states_lose_no_more_than_their_own_rounding(mode: DechunkMode) -> None:
    bits, cu_seqlens = packed_bits(mode)
    layout = chunk_layout(bits, cu_seqlens, bucket=1)
    p, h = torch.rand(bits.shape[0]), torch.randn(layout.num_chunks, 16).bfloat16()
    null_group = torch.randn(16).bfloat16()
    s = run_op(h, p, layout, mode, null_group)
    assert s.dtype is torch.bfloat16
    expected = reference.dechunk(h.double(), p.double(), bits, cu_seqlens, mode, null_group.double())
    # fp32 accumulation leaves one rounding at the end: half a bf16 unit, 2^-9 relative.
    torch.testing.assert_close(s.double(), expected, rtol=2**-8, atol=1e-6)


def test_closed_form_of_a_constant_weight() -> None:
    chunks, weight = 40, 0.3
    bits, cu_seqlens = torch.ones(chunks, dtype=torch.bool), torch.tensor([0, chunks], dtype=torch.int32)
    layout = chunk_layout(bits, cu_seqlens, bucket=1)
    p, h = torch.full((chunks,), weight, dtype=torch.float64), torch.ones(chunks, 1, dtype=torch.float64)
    s = run_op(h, p, layout, DechunkMode.OFFICIAL, torch.zeros(1, dtype=torch.float64))
    expected = 1 - (1 - weight) ** torch.arange(1, chunks + 1, dtype=torch.float64)
    torch.testing.assert_close(s[:, 0], expected)


def test_official_mode_says_what_it_lacks() -> None:
    bits, cu_seqlens = packed_bits(DechunkMode.OFFICIAL)
    layout = chunk_layout(bits, cu_seqlens, bucket=1)
    with pytest.raises(ValueError, match="null_group"):
        run_op(torch.randn(layout.num_chunks, 2), torch.rand(bits.shape[0]), layout, DechunkMode.OFFICIAL, None)
