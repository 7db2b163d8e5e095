"""F4 on the CPU build of the CUDA sources against the loop over bytes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megabyte_distill.config.model import DechunkMode
from megabyte_distill.kernels import ops, reference
from megabyte_distill.kernels.chunk_index import index_chunks
from megabyte_distill.kernels.fused import dechunk_residual
from megabyte_distill.kernels.library import Library, calls
from tests.kernels.comparison import (
    assert_agrees,
    assert_registered_well,
    assert_same_in_any_order,
    values_and_gradients,
)

MODES = list(DechunkMode)
RAGGED = (1, 5, 1, 63, 200, 2, 128)
SHAPES = {
    "ragged": (RAGGED, 0.3),
    "one byte": ((1,), 1.0),
    "63 bytes": ((63,), 0.3),
    "1000 bytes": ((1000,), 0.25),
    "single chunks": ((90, 40), 0.0),
    "all chunks": ((90, 40), 1.0),
}
"""Segment lengths, and the share of bytes that end a chunk."""


def packed_bits(shape: str, mode: DechunkMode) -> tuple[Tensor, Tensor]:
    """Bits [P] with a segment's last byte an end, its first one too except in the official way; cu_seqlens."""
    lengths, density = SHAPES[shape]
    cu_seqlens = torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0).to(torch.int32)
    bits = torch.rand(int(cu_seqlens[-1])) < density
    if mode is not DechunkMode.OFFICIAL:
        bits[cu_seqlens[:-1].long()] = True
    bits[cu_seqlens[1:].long() - 1] = True
    return bits, cu_seqlens


def case(
    shape: str, width: int, mode: DechunkMode, dtype: torch.dtype, scale: float = 1.0, bucket: int = 8
) -> tuple[Callable[..., Tensor], Callable[..., Tensor], list[Tensor | None], Tensor]:
    """(fused, definition, leaves h, p, confidence, residual, null_group, gradient of the result)."""
    bits, cu_seqlens = packed_bits(shape, mode)
    layout = index_chunks(bits, cu_seqlens, bucket)
    length = bits.shape[0]

    def run(h: Tensor, p: Tensor, confidence: Tensor, residual: Tensor, null_group: Tensor | None) -> Tensor:
        parts = {"ends": layout.ends, "chunk_of_byte": layout.chunk_of_byte, "starts": layout.starts}
        return ops.dechunk_residual(h, p, confidence, residual, **parts, mode=mode, null_group=null_group)

    def definition(h: Tensor, p: Tensor, confidence: Tensor, residual: Tensor, null_group: Tensor | None) -> Tensor:
        return reference.dechunk_residual(h, p, confidence, residual, bits, cu_seqlens, mode, null_group)

    leaves = [
        torch.randn(layout.ends.shape[0], width).to(dtype),
        torch.rand(length) * scale if scale <= 1 else (torch.rand(length) > 0.5).float(),
        torch.rand(length),
        torch.randn(length, width).to(dtype),
        torch.randn(width).to(dtype) if mode is DechunkMode.OFFICIAL else None,
    ]
    return run, definition, leaves, torch.randn(length, width)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_loop(fused: Library, shape: str, mode: DechunkMode) -> None:
    before = calls["dechunk_forward"], calls["dechunk_backward"]
    assert_agrees(*case(shape, 40, mode, torch.float32))
    assert (calls["dechunk_forward"], calls["dechunk_backward"]) == (before[0] + 1, before[1] + 1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scale", [1e-5, 1e-2, 2.0], ids=["p near 0", "p small", "p 0 or 1"])
def test_equals_the_loop_at_the_edges_of_p(fused: Library, scale: float, mode: DechunkMode) -> None:
    assert_agrees(*case("ragged", 8, mode, torch.float32, scale))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [8, 264, 1024, 4104])
def test_equals_the_loop_at_every_width(fused: Library, width: int, dtype: torch.dtype, mode: DechunkMode) -> None:
    assert_agrees(*case("ragged" if width < 4000 else "63 bytes", width, mode, dtype))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("span", [1, 33, 256, 512])
def test_equals_the_loop_whatever_bytes_a_block_holds(
    fused: Library, span: int, mode: DechunkMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dechunk_residual, "_span", lambda rows, mode: span)
    for shape, scale in (("ragged", 1e-5), ("1000 bytes", 1e-2), ("1000 bytes", 1.0)):
        assert_agrees(*case(shape, 8, mode, torch.float32, scale))


@pytest.mark.parametrize("mode", MODES)
def test_is_the_same_in_any_order_of_threads(fused: Library, mode: DechunkMode) -> None:
    run, _, leaves, upstream = case("ragged", 264, mode, torch.bfloat16)
    assert_same_in_any_order(fused, lambda: values_and_gradients(run, leaves, upstream))


@pytest.mark.parametrize("mode", MODES)
def test_gradients_that_nobody_wants_change_no_other(fused: Library, mode: DechunkMode) -> None:
    run, _, leaves, upstream = case("ragged", 16, mode, torch.float32)
    full = values_and_gradients(run, leaves, upstream)
    h = leaves[0]
    assert h is not None
    h.requires_grad_()
    z = run(h, *leaves[1:])
    assert torch.equal(z, full[0])
    assert torch.equal(torch.autograd.grad(z, h, upstream)[0], full[1])


def test_no_bytes_give_no_rows(fused: Library) -> None:
    empty, none = torch.zeros(0, 16, requires_grad=True), torch.zeros(0, dtype=torch.int64)
    z = ops.dechunk_residual(
        empty,
        torch.zeros(0),
        torch.zeros(0),
        torch.zeros(0, 16),
        ends=none,
        chunk_of_byte=none,
        starts=none.bool(),
        mode=DechunkMode.HARD,
    )
    assert z.shape == (0, 16)
    z.sum().backward()
    assert empty.grad is not None and empty.grad.shape == (0, 16)


@pytest.mark.parametrize("mode", MODES)
def test_is_registered_well(fused: Library, mode: DechunkMode) -> None:
    bits, cu_seqlens = packed_bits("63 bytes", mode)
    layout = index_chunks(bits, cu_seqlens, 8)
    leaves = [leaf if leaf is None else leaf.requires_grad_() for leaf in case("63 bytes", 16, mode, torch.float32)[2]]
    leaves[0] = torch.randn(layout.ends.shape[0], 16, requires_grad=True)
    code = MODES.index(mode)
    arguments = (*leaves, layout.ends, layout.chunk_of_byte, layout.starts, code, mode is not DechunkMode.HARD)
    assert_registered_well(torch.ops.megabyte.dechunk_residual, arguments)


@pytest.mark.parametrize("mode", MODES)
def test_compiles_into_one_graph(fused: Library, mode: DechunkMode) -> None:
    run, _, leaves, upstream = case("63 bytes", 16, mode, torch.float32)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for mine, expected in zip(
        values_and_gradients(compiled, leaves, upstream), values_and_gradients(run, leaves, upstream), strict=True
    ):
        assert torch.equal(mine, expected)
