"""The router's probabilities, decisions and steps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megabyte_distill.alphabet import BOS_BYTE
from megabyte_distill.config.model import RouterKind
from megabyte_distill.model.router import Router, decide
from tests.model.byte_side import TINY

KINDS = pytest.mark.parametrize("kind", list(RouterKind))


def make_router(kind: RouterKind) -> Router:
    return Router(replace(TINY, router=kind))


@KINDS
def test_step_equals_forward(kind: RouterKind) -> None:
    router = make_router(kind)
    r, cu_seqlens = torch.randn(9, 12), torch.tensor([0, 4, 9], dtype=torch.int32)
    p = router(r, cu_seqlens)
    inside = [0, 1, 2, 4, 5, 6, 7]
    torch.testing.assert_close(router.step(r[inside], r[[t + 1 for t in inside]]), p[inside])
    assert p[[3, 8]].tolist() == [1.0, 1.0]


@KINDS
def test_p_looks_one_byte_ahead_and_no_further(kind: RouterKind) -> None:
    router = make_router(kind)
    r, cu_seqlens = torch.randn(9, 12), torch.tensor([0, 9], dtype=torch.int32)
    changed = r.clone()
    changed[5] += 1.0
    moved = (router(r, cu_seqlens) != router(changed, cu_seqlens)).nonzero()[:, 0].tolist()
    assert moved == [4, 5]


def test_decisions_force_bos_except_in_the_official_way() -> None:
    byte_ids = torch.tensor([BOS_BYTE, 1, 2, BOS_BYTE, 3])
    p = torch.tensor([0.1, 0.7, 1.0, 0.2, 1.0])
    assert decide(p, byte_ids).tolist() == [True, True, True, True, True]
    assert decide(p, byte_ids, threshold=0.8).tolist() == [True, False, True, True, True]
    assert decide(p, byte_ids, official=True).tolist() == [False, True, True, False, True]


@KINDS
def test_bf16_parameters_give_fp32_probabilities(kind: RouterKind) -> None:
    router = make_router(kind).bfloat16()
    p = router(torch.randn(5, 12).bfloat16(), torch.tensor([0, 5], dtype=torch.int32))
    assert p.dtype is torch.float32


def test_a_linear_router_begins_with_the_angle_between_neighbours() -> None:
    router = make_router(RouterKind.LINEAR)
    assert {name: tuple(value.shape) for name, value in router.named_parameters()} == {
        "q.weight": (12, 12),
        "k.weight": (12, 12),
    }
    r = torch.randn(9, 12)
    r[4] = 2.0 * r[3]
    p = router(r, torch.tensor([0, 9], dtype=torch.int32))
    torch.testing.assert_close(p[:-1], (1 - torch.cosine_similarity(r[:-1], r[1:])) / 2)
    assert float(p[3]) == pytest.approx(0.0, abs=1e-6)
