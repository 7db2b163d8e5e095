"""The router's probabilities, decisions and steps."""

from __future__ import annotations

import torch

from megabyte_distill.alphabet import BOS_BYTE
from megabyte_distill.config.model import ByteMixer
from megabyte_distill.model.router import Router, decide
from tests.model.byte_side import tiny_config


def test_step_equals_forward() -> None:
    router = Router(tiny_config(ByteMixer.CONV))
    r, cu_seqlens = torch.randn(9, 12), torch.tensor([0, 4, 9], dtype=torch.int32)
    p = router(r, cu_seqlens)
    inside = [0, 1, 2, 4, 5, 6, 7]
    torch.testing.assert_close(router.step(r[inside], r[[t + 1 for t in inside]]), p[inside])
    assert p[[3, 8]].tolist() == [1.0, 1.0]


def test_p_looks_one_byte_ahead_and_no_further() -> None:
    router = Router(tiny_config(ByteMixer.CONV))
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


def test_bf16_parameters_give_fp32_probabilities() -> None:
    router = Router(tiny_config(ByteMixer.CONV)).bfloat16()
    p = router(torch.randn(5, 12).bfloat16(), torch.tensor([0, 5], dtype=torch.int32))
    assert p.dtype is torch.float32
