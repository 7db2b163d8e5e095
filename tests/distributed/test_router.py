"""A router whose projections two ranks share, in fp64: the step from cosines near 1 to log p forgives no rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megabyte_distill.config.model import ByteSideConfig, RouterKind
from megabyte_distill.model.parallel_linears import TensorParallelLinears
from megabyte_distill.model.router import Router
from megabyte_distill.parallel.process_groups import World
from tests.distributed.ranks import run_ranks

CU_SEQLENS = torch.tensor([0, 1, 7, 40], dtype=torch.int32)


def with_gradients(router: nn.Module, r: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    r = r.clone().requires_grad_(True)
    p = router(r, CU_SEQLENS)
    (p.log() * torch.arange(p.shape[0])).sum().backward()
    assert r.grad is not None
    return p.detach(), r.grad, {name: own.grad for name, own in router.named_parameters() if own.grad is not None}


def compare(ranks: World) -> dict[str, Any]:
    config = ByteSideConfig(backbone_width=24, router=RouterKind.LINEAR)
    whole, own = Router(config).double(), Router(config, TensorParallelLinears()).double()
    generator = torch.Generator().manual_seed(0)
    for ours, theirs in zip(own.parameters(), whole.parameters(), strict=True):
        moved = 0.3 * torch.randn(theirs.shape, generator=generator, dtype=torch.float64)
        theirs.data += moved
        ours.data += moved.chunk(2)[ranks.rank]
    r = torch.randn(40, 24, generator=generator, dtype=torch.float64)
    expected, found = with_gradients(whole, r), with_gradients(own, r)
    far = [float((a - b).abs().max()) for a, b in zip(expected[:2], found[:2], strict=True)]
    far += [float((grad.chunk(2)[ranks.rank] - found[2][name]).abs().max()) for name, grad in expected[2].items()]
    return {"far": far, "gradients": sorted(found[2])}


def test_ranks_that_share_a_linear_router_have_the_gradients_of_one(tmp_path: Path) -> None:
    for answer in run_ranks(tmp_path, __name__, "compare", tensor_parallel=2):
        assert answer["gradients"] == ["k.weight", "q.weight"]
        assert len(answer["far"]) == 4 and max(answer["far"]) < 1e-11, answer
