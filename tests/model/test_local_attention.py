"""The sliding-window mixer: the dense formula on ragged segments, its reach, what it keeps, its refusals."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from megabyte_distill.config.model import ByteMixer
from megabyte_distill.kernels import reference
from megabyte_distill.kernels.segments import Segments
from megabyte_distill.model.linears import PlainLinears
from megabyte_distill.model.local_attention import ROPE_THETA, LocalAttentionBlock
from tests.model.byte_side import tiny_config

CONFIG = tiny_config(ByteMixer.LOCAL_ATTENTION)


def make_block(window: int = 6) -> LocalAttentionBlock:
    return LocalAttentionBlock(replace(CONFIG, byte_attention_window=window), 0, PlainLinears())


def segments_of(*lengths: int) -> Segments:
    return Segments(torch.tensor((0, *lengths)).cumsum(0).to(torch.int32), sum(lengths))


def dense(block: LocalAttentionBlock, x: Tensor, segments: Segments) -> Tensor:
    """The layer written out with a P × P mask; pairs of features are complex numbers that positions turn."""
    normed = reference.rms_norm(x, block.norm.weight, 1e-5)
    query, key, value = (part(normed).unflatten(-1, (-1, block.head_dim)) for part in (block.q, block.k, block.v))
    half = block.head_dim // 2
    place = torch.arange(x.shape[0])
    angles = place[:, None, None] * ROPE_THETA ** (-torch.arange(half, dtype=torch.float64) / half)
    turned = [
        torch.complex(part[..., :half], part[..., half:]) * torch.polar(torch.ones_like(angles), angles)
        for part in (query, key)
    ]
    scores = torch.einsum("thd,shd->hts", turned[0], turned[1].conj()).real / block.head_dim**0.5
    hidden = torch.ones(x.shape[0], x.shape[0], dtype=torch.bool)
    for first, last in pairwise(segments.cu_seqlens.tolist()):
        hidden[first:last, first:last] = False
    ago = place[:, None] - place
    weights = scores.masked_fill(hidden | (ago < 0) | (ago >= block.window), -torch.inf).softmax(-1)
    result: Tensor = x + block.out(torch.einsum("hts,shd->thd", weights, value).flatten(1))
    return result


@pytest.mark.parametrize("window", [1, 6, 64])
def test_block_equals_the_dense_formula_on_ragged_segments(window: int) -> None:
    block, segments = make_block(window).double(), segments_of(0, 1, 63, 0, 1000, 64, 65, 2, 0)
    x = torch.randn(segments.length, 8, dtype=torch.float64, requires_grad=True)
    weights = torch.randn_like(x)
    leaves = {"x": x, **dict(block.named_parameters())}
    found, wanted = (run(x, segments) for run in (block, lambda *given: dense(block, *given)))
    # cosines and sines are fp32
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    for name, got, expected in zip(
        leaves,
        torch.autograd.grad((found * weights).sum(), [*leaves.values()], allow_unused=True),
        torch.autograd.grad((wanted * weights).sum(), [*leaves.values()], allow_unused=True),
        strict=True,
    ):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3, msg=lambda text, name=name: f"{name}: {text}")


def test_a_byte_reaches_exactly_its_window() -> None:
    block, segments = make_block(), segments_of(3, 20, 9)
    x = torch.randn(32, 8)
    changed = x.clone()
    changed[8] += 1.0
    moved = (block(x, segments) != block(changed, segments)).any(-1).nonzero()[:, 0].tolist()
    assert moved == list(range(8, 14))
    changed = x.clone()
    changed[21] += 1.0  # two bytes before its segment's end
    moved = (block(x, segments) != block(changed, segments)).any(-1).nonzero()[:, 0].tolist()
    assert moved == [21, 22]


@pytest.mark.parametrize("position", [131_072, 1_000_000])
def test_only_differences_of_positions_matter_however_far_the_document_goes(position: int) -> None:
    """Against fp64 at the document's start: in a window that holds new bytes alone, nothing else may change."""
    block = make_block()
    x = torch.randn(2, 40, 8)
    start = replace(block.init_state(2, x.device), position=torch.full((2,), position))
    found, _ = block.steps(x, start)
    exact = block.double()
    wanted, _ = exact.steps(x.double(), exact.init_state(2, x.device))
    new = slice(block.window - 1, None)
    torch.testing.assert_close(found[:, new].double(), wanted[:, new], rtol=2e-6, atol=2e-6)


def test_what_is_kept_for_the_backward_pass_grows_with_the_length_not_its_square() -> None:
    kept = []
    for length in (1024, 4096):
        storages: dict[int, int] = {}

        def keep(tensor: Tensor, storages: dict[int, int] = storages) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = make_block(16)(torch.randn(length, 8), segments_of(length))
        assert out.requires_grad
        kept.append(sum(storages.values()))
    assert kept[1] < 4.2 * kept[0]


@pytest.mark.parametrize(("width", "head_dim"), [(8, 3), (12, 8), (9, 9)])
def test_a_head_width_that_does_not_divide_or_is_odd_is_refused(width: int, head_dim: int) -> None:
    with pytest.raises(ValueError, match="byte_attention_head_dim"):
        LocalAttentionBlock(replace(CONFIG, byte_width=width, byte_attention_head_dim=head_dim), 0, PlainLinears())
