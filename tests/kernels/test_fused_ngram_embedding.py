"""F1 with n-gram tables on the CPU build of the CUDA sources against its definition."""

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

NGRAM_ROWS = 70


def reads(rows: int, tables: int) -> tuple[Tensor, Tensor]:
    """byte_ids [rows], indices [rows, tables]: some rows of the table are read by many, some by nobody."""
    hot = torch.rand(rows, tables) < 0.5
    indices = torch.where(hot, 3, torch.randint(0, NGRAM_ROWS // 2, (rows, tables)))
    return torch.randint(0, 256, (rows,)), indices


def tables_of(width: int, dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(256, width).to(dtype), torch.randn(NGRAM_ROWS, width).to(dtype)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows, width, tables", [(0, 64, 6), (1, 8, 1), (63, 1032, 6), (1000, 40, 8)])
def test_equals_the_definition(fused: Library, rows: int, width: int, tables: int, dtype: torch.dtype) -> None:
    byte_ids, indices = reads(rows, tables)
    before = calls["ngram_embedding_forward"]
    assert_agrees(
        lambda *own: ops.ngram_embedding(byte_ids, indices, *own),
        lambda *own: reference.ngram_embedding(byte_ids, indices, *own),
        tables_of(width, dtype),
        torch.randn(rows, width),
    )
    assert calls["ngram_embedding_forward"] == before + 1


def test_rows_that_nobody_reads_have_gradient_zero(fused: Library) -> None:
    byte_ids, indices = reads(50, 4)
    own = tables_of(16, torch.float32)
    grad = values_and_gradients(lambda *own: ops.ngram_embedding(byte_ids, indices, *own), own, torch.ones(50, 16))[2]
    assert torch.equal(grad[:, 0], indices.flatten().bincount(minlength=NGRAM_ROWS).float())


@pytest.mark.parametrize("rows", [127, 128, 129, 256, 300])
def test_runs_that_begin_and_end_anywhere_in_a_piece_equal_the_definition(fused: Library, rows: int) -> None:
    for before in (0, 1, 127):
        indices = torch.full((rows, 1), 5)
        indices[:before] = 2
        indices[-1] = 9
        byte_ids = torch.randint(0, 256, (rows,))
        assert_agrees(
            lambda *own, given=(byte_ids, indices): ops.ngram_embedding(*given, *own),
            lambda *own, given=(byte_ids, indices): reference.ngram_embedding(*given, *own),
            tables_of(8, torch.float32),
            torch.randn(rows, 8),
        )


def test_is_the_same_in_any_order_of_threads(fused: Library) -> None:
    byte_ids, indices = reads(80, 6)
    own, upstream = tables_of(1032, torch.bfloat16), torch.randn(80, 1032)
    assert_same_in_any_order(
        fused,
        lambda: values_and_gradients(lambda *own: ops.ngram_embedding(byte_ids, indices, *own), own, upstream),
    )


def test_an_index_outside_the_table_gives_nan_and_touches_nothing_else(fused: Library) -> None:
    byte_ids, indices = reads(5, 2)
    indices[1, 1], indices[3, 0], byte_ids[4] = NGRAM_ROWS, -1, 256
    rows = ops.ngram_embedding(byte_ids, indices, *tables_of(8, torch.float32))
    assert rows.isnan().all(1).tolist() == [False, True, False, True, True]
    assert not rows[[0, 2]].isnan().any()


def test_is_registered_well(fused: Library) -> None:
    own = [leaf.requires_grad_() for leaf in tables_of(16, torch.float32)]
    assert_registered_well(torch.ops.megabyte.ngram_embedding, (*reads(20, 3), *own))


def test_compiles_into_one_graph(fused: Library) -> None:
    given, own, upstream = reads(20, 3), tables_of(16, torch.float32), torch.randn(20, 16)

    def run(*own: Tensor) -> Tensor:
        return ops.ngram_embedding(*given, *own).square()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for mine, expected in zip(
        values_and_gradients(compiled, own, upstream), values_and_gradients(run, own, upstream), strict=True
    ):
        assert torch.equal(mine, expected)


def test_says_what_it_does_not_take(fused: Library) -> None:
    byte_ids, indices = reads(2, 9)
    with pytest.raises(ValueError, match="got 9 n-gram tables, expected 1 to 8"):
        ops.ngram_embedding(byte_ids, indices, *tables_of(8, torch.float32))
