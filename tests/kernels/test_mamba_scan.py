"""Mamba-2's scan by mamba_ssm's kernels against our own, where there is a GPU and the package."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from megabyte_distill.config.training import KernelMode
from megabyte_distill.kernels import dispatch, selection
from megabyte_distill.kernels.fused import mamba_scan
from megabyte_distill.kernels.segments import Segments
from megabyte_distill.kernels.ssm_scan import ssm_scan

needs_a_gpu = pytest.mark.skipif(
    not (torch.cuda.is_available() and mamba_scan.is_usable()),
    reason="needs a GPU and the package mamba_ssm: python -m pytest tests/kernels/test_mamba_scan.py there",
)
SEGMENTS = [[1], [63, 1, 1000, 7, 300], [256, 256], [1] * 70]


@pytest.fixture
def in_place() -> Iterator[None]:
    dispatch.install({"ssm_scan": mamba_scan.FUSED}, device="cuda")
    yield
    dispatch.install({})


def inputs(lengths: list[int], dtype: torch.dtype) -> tuple[list[Tensor], Segments]:
    torch.manual_seed(sum(lengths))
    size, heads, features, state = sum(lengths), 4, 64, 128
    x = torch.randn(size, heads, features).to(dtype)
    b, c = (torch.randn(size, state).to(dtype) / state**0.25 for _ in range(2))
    dt, a = torch.rand(size, heads) * 0.1 + 1e-3, -torch.rand(heads) * 15 - 1
    edges = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    return [value.cuda().requires_grad_() for value in (x, dt, a, b, c)], Segments(edges.cuda(), size)


@needs_a_gpu
@pytest.mark.parametrize("lengths", SEGMENTS, ids=lambda lengths: f"{len(lengths)}x{max(lengths)}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients(in_place: None, lengths: list[int], dtype: torch.dtype) -> None:
    """Products on tensor cores: tf32 keeps 10 bits of mantissa, bf16 eight; sums run over up to 256 + 128 terms."""
    values, segments = inputs(lengths, dtype)
    got = ssm_scan(*values, segments, 256)  # type: ignore[arg-type]
    assert got.dtype is dtype
    dispatch.install({})
    wide = [value.detach().double().requires_grad_() for value in values]
    wanted = ssm_scan(*wide, segments, 256)  # type: ignore[arg-type]
    allowed = 3e-3 if dtype is torch.float32 else 1.5e-2
    assert (got.double() - wanted).norm() <= allowed * wanted.norm()
    upstream = torch.randn_like(wanted)
    ours = torch.autograd.grad(got, values, upstream.to(got.dtype))
    theirs = torch.autograd.grad(wanted, wide, upstream)
    for name, one, other in zip(("x", "dt", "a", "b", "c"), ours, theirs, strict=True):
        assert (one.double() - other).norm() <= 2 * allowed * other.norm(), name


@pytest.mark.parametrize(
    ("block", "taken"), [(1, 64), (64, 64), (100, 64), (128, 128), (255, 128), (256, 256), (1000, 256)]
)
def test_blocks_are_powers_of_two(block: int, taken: int) -> None:
    assert mamba_scan.block_size(block) == taken


def test_without_a_gpu_nothing_is_put_in_place() -> None:
    assert selection.scan_kernels(torch.device("cpu")) == {}
    assert not selection.choose(KernelMode.AUTO, torch.device("cpu")).scans_fused


def test_heads_it_does_not_take_go_to_torch_although_fused_kernels_are_demanded() -> None:
    dispatch.install({"ssm_scan": mamba_scan.FUSED}, device="cpu", strict=True)
    try:
        assert dispatch.fused("ssm_scan", torch.empty(3, 4, 48)) is None
    finally:
        dispatch.install({})


def test_what_the_kernels_do_not_take_is_said() -> None:
    refusal = mamba_scan.FUSED.refusal
    assert refusal(torch.empty(0, 4, 64)) == "got no bytes, expected some"
    assert refusal(torch.empty(3, 4, 48)) == "got a head of 48, expected a power of two"
    assert refusal(torch.empty(3, 4, 64)) is None
