"""F1 on the CPU build of the CUDA sources against its definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megabyte_distill.kernels import ops, reference
from megabyte_distill.kernels.fused import byte_embedding
from megabyte_distill.kernels.library import Library, calls
from tests.kernels.comparison import (
    assert_agrees,
    assert_registered_well,
    assert_same_in_any_order,
    values_and_gradients,
)

EPS = 1e-5
VARIANTS = {"table": (False, False), "added": (True, False), "normed": (False, True), "all": (True, True)}
KERNELS = {"table": "stream", "added": "stream", "normed": "normed", "all": "added_normed"}


def definition(byte_ids: Tensor, table: Tensor, added: Tensor | None, weight: Tensor | None) -> Tensor:
    if byte_ids.shape[0] == 0:
        return table.new_zeros(0, table.shape[1])
    rows = reference.byte_embedding(byte_ids, table, added)
    return rows if weight is None else reference.rms_norm(rows, weight, EPS)


def leaves(rows: int, width: int, variant: str, dtype: torch.dtype) -> list[Tensor | None]:
    added, normed = VARIANTS[variant]
    return [
        torch.randn(256, width).to(dtype),
        torch.randn(rows, width).to(dtype) if added else None,
        torch.randn(width).to(dtype) if normed else None,
    ]


def few_hot_ids(rows: int) -> Tensor:
    """Ids [rows] of which three make up almost everything, as in text: their runs cross many pieces.

    A piece's worth of id 3 comes first in the sorted order, so that the run behind it begins where a piece does.
    """
    byte_ids = torch.where(torch.rand(rows) < 0.9, torch.tensor([32, 101, 255])[torch.randint(0, 3, (rows,))], 32)
    byte_ids[torch.randperm(rows)[: 32 if rows > 32 else 0]] = 3
    return byte_ids


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows, width", [(0, 64), (1, 8), (63, 1024), (1000, 40), (33, 4104)])
def test_equals_the_definition(fused: Library, rows: int, width: int, dtype: torch.dtype, variant: str) -> None:
    byte_ids = few_hot_ids(rows)
    kernel = f"byte_embedding_{KERNELS[variant]}"
    before = calls[kernel]
    assert_agrees(
        lambda *own: ops.byte_embedding(byte_ids, *own, eps=EPS),
        lambda *own: definition(byte_ids, *own),
        leaves(rows, width, variant, dtype),
        torch.randn(rows, width),
    )
    assert calls[kernel] == before + 1


@pytest.mark.parametrize("variant", VARIANTS)
def test_is_the_same_in_any_order_of_threads(fused: Library, variant: str) -> None:
    byte_ids, own, upstream = few_hot_ids(150), leaves(150, 264, variant, torch.bfloat16), torch.randn(150, 264)

    def run() -> list[Tensor]:
        return values_and_gradients(lambda *given: ops.byte_embedding(byte_ids, *given), own, upstream)

    assert_same_in_any_order(fused, run)


@pytest.mark.parametrize("variant", VARIANTS)
def test_pieces_of_several_turns_of_a_warp(fused: Library, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(byte_embedding, "_rows_per_piece", lambda rows, device: 96)
    byte_ids = few_hot_ids(700)
    assert_agrees(
        lambda *own: ops.byte_embedding(byte_ids, *own, eps=EPS),
        lambda *own: definition(byte_ids, *own),
        leaves(700, 24, variant, torch.float32),
        torch.randn(700, 24),
    )


@pytest.mark.parametrize("variant", ["normed", "all"])
def test_stream_and_normed_rows_from_one_call_add_their_gradients(fused: Library, variant: str) -> None:
    byte_ids, own = few_hot_ids(90), leaves(90, 72, variant, torch.float32)
    for_stream, for_normed = torch.randn(90, 72), torch.randn(90, 72)
    results = []
    for both in (True, False):
        given = [None if leaf is None else leaf.clone().requires_grad_() for leaf in own]
        if both:
            stream, normed, _ = torch.ops.megabyte.byte_embedding(byte_ids, *given, EPS, True)
        else:
            table, added, weight = given
            assert table is not None and weight is not None
            stream = reference.byte_embedding(byte_ids, table, added)
            normed = reference.rms_norm(stream, weight, EPS)
        present = [leaf for leaf in given if leaf is not None]
        grads = torch.autograd.grad([stream, normed], present, [for_stream, for_normed])
        results.append((stream.detach(), normed.detach(), *grads))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [0, 1, 257, 20_000])
def test_bytes_are_sorted_stably(fused: Library, rows: int) -> None:
    byte_ids = few_hot_ids(rows)
    order, run_starts = byte_embedding.byte_order(byte_ids, 256, fused)
    expected = byte_ids.sort(stable=True)
    assert torch.equal(order.long(), expected.indices)
    assert torch.equal(run_starts.long(), torch.searchsorted(expected.values, torch.arange(257)))


@pytest.mark.parametrize("wants", [(True, False, False), (False, True, True), (False, True, False)])
@pytest.mark.parametrize("variant", ["added", "all"])
def test_gradients_that_nobody_wants_change_no_other(
    fused: Library, variant: str, wants: tuple[bool, bool, bool]
) -> None:
    byte_ids, own, upstream = few_hot_ids(60), leaves(60, 16, variant, torch.bfloat16), torch.randn(60, 16)
    full = values_and_gradients(lambda *given: ops.byte_embedding(byte_ids, *given), own, upstream)[1:]
    given = [leaf if leaf is None else leaf.clone().requires_grad_(want) for leaf, want in zip(own, wants, strict=True)]
    result = ops.byte_embedding(byte_ids, *given)
    result.backward(upstream.to(result.dtype))
    for leaf, expected in zip([leaf for leaf in given if leaf is not None], full, strict=True):
        assert torch.equal(leaf.grad, expected) if leaf.requires_grad else leaf.grad is None


def test_an_id_outside_the_table_gives_nan_and_touches_nothing_else(fused: Library) -> None:
    table = torch.randn(4, 8)
    rows = ops.byte_embedding(torch.tensor([0, 4, -1, 3]), table)
    assert torch.equal(rows[[0, 3]], table[[0, 3]])
    assert bool(rows[1:3].isnan().all())


@pytest.mark.parametrize("variant", VARIANTS)
def test_is_registered_well(fused: Library, variant: str) -> None:
    own = [None if leaf is None else leaf.requires_grad_() for leaf in leaves(20, 16, variant, torch.float32)]
    assert_registered_well(torch.ops.megabyte.byte_embedding, (few_hot_ids(20), *own, EPS, True))


def test_compiles_into_one_graph(fused: Library) -> None:
    byte_ids, own, upstream = few_hot_ids(40), leaves(40, 16, "all", torch.float32), torch.randn(40, 16)

    def run(*given: Tensor) -> Tensor:
        return ops.byte_embedding(byte_ids, *given).square()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for mine, expected in zip(
        values_and_gradients(compiled, own, upstream), values_and_gradients(run, own, upstream), strict=True
    ):
        assert torch.equal(mine, expected)


def test_says_what_it_does_not_take(fused: Library) -> None:
    byte_ids = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"--kernels fused.*width of 12, expected a multiple of 8"):
        ops.byte_embedding(byte_ids, torch.zeros(4, 12))
    with pytest.raises(ValueError, match="got a table of 300 rows, expected at most 256"):
        ops.byte_embedding(byte_ids, torch.zeros(300, 8))
    with pytest.raises(ValueError, match="got a width of 8200, expected a multiple of 8 up to 8192"):
        ops.byte_embedding(byte_ids, torch.zeros(4, 8200), torch.zeros(2, 8200), torch.zeros(8200))
    with pytest.raises(ValueError, match="got float64, expected float32 or bfloat16"):
        ops.byte_embedding(byte_ids, torch.zeros(4, 8, dtype=torch.float64))
    mixed = byte_embedding.refusal(byte_ids, torch.zeros(4, 8), torch.zeros(2, 8, dtype=torch.bfloat16))
    assert mixed is not None and "bfloat16, float32" in mixed


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_id_outside_a_small_table_writes_behind_no_gradient(fused: Library, variant: str) -> None:
    byte_ids, upstream = torch.tensor([0, 2, 0, 3, 1]), torch.randn(5, 8)
    own = leaves(5, 8, variant, torch.float32)
    own[0] = torch.randn(4, 8)

    def gradient_of_table(ids: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        given = [own[0], None if own[1] is None else own[1][rows], own[2]]
        run = values_and_gradients(lambda *given: ops.byte_embedding(ids, *given), given, upstream[rows])
        return run[1]

    outside = byte_ids.clone()
    outside[[1, 4]] = torch.tensor([200, 4])
    inside = torch.tensor([0, 2, 3])
    got = gradient_of_table(outside, torch.arange(5))
    torch.testing.assert_close(got, gradient_of_table(byte_ids[inside], inside))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_frozen_table_hands_the_added_state_its_gradient(fused: Library, dtype: torch.dtype) -> None:
    byte_ids, upstream = few_hot_ids(20), torch.randn(20, 16)
    added = torch.randn(20, 16).to(dtype).requires_grad_()
    ops.byte_embedding(byte_ids, torch.randn(256, 16).to(dtype), added).backward(upstream)
    assert torch.equal(added.grad, upstream.to(dtype))
