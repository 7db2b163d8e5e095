"""F2 on the CPU build of the CUDA sources: probabilities and gradients against the definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megabyte_distill.kernels import ops, reference
from megabyte_distill.kernels.library import Library, calls
from tests.kernels.comparison import (
    assert_agrees,
    assert_registered_well,
    assert_same_in_any_order,
    values_and_gradients,
)
from tests.kernels.packed import ROWS, offsets


def projections(rows: int, width: int, dtype: torch.dtype, kind: str = "random") -> list[Tensor]:
    """q, k [rows, width]; ``parallel`` and ``antiparallel`` rows have p near 0 and 1."""
    q, k = torch.randn(rows, width), torch.randn(rows, width)
    if kind != "random" and rows:
        sign = 1.0 if kind == "parallel" else -1.0
        k = sign * torch.cat((q[-1:], q[:-1])) * (0.5 + torch.rand(rows, 1)) + 1e-3 * torch.randn(rows, width)
    return [q.to(dtype), k.to(dtype)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "row, width",
    [("none", 16), ("one", 8), ("single", 1024), ("ones", 264), ("ragged", 40), ("long", 64)],
)
def test_equals_the_definition(fused: Library, row: str, width: int, dtype: torch.dtype) -> None:
    cu_seqlens = offsets(ROWS[row])
    rows, before = int(cu_seqlens[-1]), calls["routing_forward"]
    assert_agrees(
        lambda q, k: ops.routing_probabilities(q, k, cu_seqlens),
        lambda q, k: reference.routing_probabilities(q, k, cu_seqlens),
        projections(rows, width, dtype),
        torch.randn(rows),
    )
    assert calls["routing_forward"] == before + 1


@pytest.mark.parametrize("kind", ["parallel", "antiparallel"])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_equals_the_definition_near_zero_and_one(fused: Library, kind: str, scale: float) -> None:
    cu_seqlens = offsets((100, 30))
    own = [leaf * scale for leaf in projections(130, 72, torch.float32, kind)]
    expected = reference.routing_probabilities(*(leaf.double() for leaf in own), cu_seqlens)
    p = ops.routing_probabilities(*own, cu_seqlens)
    assert bool(((p >= 0) & (p <= 1)).all()) and p[[99, 129]].tolist() == [1.0, 1.0]
    # 1 − cos is a difference of nearly equal numbers: one unit of the cosine is what fp32 has
    torch.testing.assert_close(p.double(), expected, rtol=0, atol=3e-7)
    assert_agrees(
        lambda q, k: ops.routing_probabilities(q, k, cu_seqlens),
        lambda q, k: reference.routing_probabilities(q, k, cu_seqlens),
        projections(130, 72, torch.bfloat16, kind),
        torch.randn(130),
    )


def test_a_zero_row_has_cosine_zero_and_torchs_gradient(fused: Library) -> None:
    q, k = projections(6, 16, torch.float32)
    q[1], k[4] = 0.0, 0.0
    cu_seqlens, upstream = offsets((6,)), torch.randn(6)
    mine = values_and_gradients(lambda q, k: ops.routing_probabilities(q, k, cu_seqlens), [q, k], upstream)
    truth = values_and_gradients(
        lambda q, k: reference.routing_probabilities(q, k, cu_seqlens), [q.double(), k.double()], upstream
    )
    assert mine[0][[1, 3]].tolist() == [0.5, 0.5]
    for got, expected in zip(mine, truth, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-6)


def test_nothing_flows_over_a_documents_end_not_even_a_nan(fused: Library) -> None:
    q, k = projections(20, 16, torch.float32)
    q[9], k[10] = torch.nan, torch.inf  # the last byte's q and the first byte's k of two documents: no pair has them
    cu_seqlens = offsets((10, 10))
    p, d_q, d_k = values_and_gradients(
        lambda q, k: ops.routing_probabilities(q, k, cu_seqlens), [q, k], torch.randn(20)
    )
    for values in (p, d_q, d_k):
        assert bool(values.isfinite().all())
    assert not d_q[[9, 19]].any() and not d_k[[0, 10]].any()


def test_a_nan_inside_a_document_shows_itself(fused: Library) -> None:
    q, k = projections(8, 16, torch.float32)
    q[3, 5] = torch.nan
    p = ops.routing_probabilities(q, k, offsets((8,)))
    assert p.isnan().nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize("width", [264, 1024])
def test_is_the_same_in_any_order_of_threads(fused: Library, width: int) -> None:
    # many documents: the search for their edges takes more than one step
    cu_seqlens = offsets((2,) * 40 + (1,) * 20)
    own, upstream = projections(100, width, torch.bfloat16), torch.randn(100)
    assert_same_in_any_order(
        fused,
        lambda: values_and_gradients(lambda q, k: ops.routing_probabilities(q, k, cu_seqlens), own, upstream),
    )


@pytest.mark.parametrize("documents", [31, 32, 33, 63, 1025, 2000])
def test_finds_the_ends_among_many_documents(fused: Library, documents: int) -> None:
    lengths = tuple(1 + (i * 7) % 3 for i in range(documents))
    cu_seqlens = offsets(lengths)
    rows = int(cu_seqlens[-1])
    # equal rows: p is 0 inside a document and 1 at its end
    same = torch.ones(rows, 8)
    p = ops.routing_probabilities(same, same, cu_seqlens)
    expected = torch.zeros(rows)
    expected[cu_seqlens[1:].long() - 1] = 1.0
    torch.testing.assert_close(p, expected, rtol=0, atol=1e-6)


def test_is_registered_well(fused: Library) -> None:
    own = [leaf.requires_grad_() for leaf in projections(20, 16, torch.float32)]
    assert_registered_well(torch.ops.megabyte.routing, (*own, offsets((5, 15))))


def test_compiles_into_one_graph(fused: Library) -> None:
    cu_seqlens, own, upstream = offsets((5, 15)), projections(20, 16, torch.float32), torch.randn(20)

    def run(q: Tensor, k: Tensor) -> Tensor:
        return ops.routing_probabilities(q, k, cu_seqlens).square()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for mine, expected in zip(
        values_and_gradients(compiled, own, upstream), values_and_gradients(run, own, upstream), strict=True
    ):
        assert torch.equal(mine, expected)


def test_says_what_it_does_not_take(fused: Library) -> None:
    with pytest.raises(ValueError, match="width of 12, expected a multiple of 8"):
        ops.routing_probabilities(torch.zeros(2, 12), torch.zeros(2, 12), offsets((2,)))
    with pytest.raises(ValueError, match="got bfloat16, float32"):
        ops.routing_probabilities(torch.zeros(2, 8), torch.zeros(2, 8).bfloat16(), offsets((2,)))
