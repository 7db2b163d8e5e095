"""How a loss on the logits reaches the router: through p's straight-through factor, and in the EMA through p itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megabyte_distill.config.model import ByteMixer, DechunkMode, RouterKind
from megabyte_distill.model.student import Gold, RouterDecides, Student
from megabyte_distill.objectives.boundary import boundary_bce
from tests.tiny_student import padded_row, tiny_student

pytestmark = pytest.mark.usefixtures("world")


def swiglu(module: torch.nn.Module, x: Tensor) -> Tensor:
    value, gate, out = (module.get_submodule(name).get_parameter("weight") for name in ("value", "gate", "out"))
    hidden = x @ gate.t()
    return (x @ value.t() * hidden * hidden.sigmoid()) @ out.t()


def projected(module: torch.nn.Module, x: Tensor) -> Tensor:
    return x @ module.weight.t() if isinstance(module, torch.nn.Linear) else swiglu(module, x)


def plain_p(student: Student, r: Tensor, cu_seqlens: Tensor) -> Tensor:
    """p written out: half of one minus the cosine, one at each segment's last byte."""
    q, k = projected(student.router.q, r[:-1]), projected(student.router.k, r[1:])
    cosine = (q * k).sum(-1) / (q.square().sum(-1).sqrt() * k.square().sum(-1).sqrt())
    p = torch.cat(((1 - cosine) / 2, torch.ones(1, dtype=r.dtype)))
    last = torch.zeros(r.shape[0], dtype=torch.bool)
    last[cu_seqlens[1:].long() - 1] = True
    return torch.where(last, 1.0, p)


@pytest.mark.parametrize("router", list(RouterKind))
def test_bce_reaches_router_and_encoder_as_plain_autograd_says(router: RouterKind) -> None:
    student, row = tiny_student(router=router).double(), padded_row()
    outputs = student(row)
    parameters = [*student.router.parameters(), *student.byte_encoder.parameters()]
    mask = row.is_real
    p = plain_p(student, outputs.r, row.cu_seqlens)
    torch.testing.assert_close(outputs.p, p)
    inside = mask & (p < 1)
    plain = torch.where(row.bits, -p.log(), -(1 - p).log())[inside].sum()
    expected = torch.autograd.grad(plain, parameters, retain_graph=True)
    # the loss itself is computed in fp32
    got = torch.autograd.grad(boundary_bce(outputs.p, row.bits)[inside].sum(), parameters)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mixer", list(ByteMixer))
@pytest.mark.parametrize("boundaries", [Gold(), RouterDecides()], ids=["gold", "router"])
def test_in_hard_mode_the_factor_is_the_only_way_and_favours_the_side_taken(
    mixer: ByteMixer, boundaries: Gold | RouterDecides
) -> None:
    student, row = tiny_student(mixer).double(), padded_row()
    seen: dict[str, Tensor] = {}
    student.router.register_forward_hook(lambda module, args, p: (seen.update(p=p), p.retain_grad())[0])
    student.byte_decoder.input.register_full_backward_hook(lambda module, grads, out: seen.update(ds=grads[0]))
    outputs = student(row, boundaries)
    (outputs.logits.sin() * row.is_real[:, None]).sum().backward()
    s = outputs.hidden[outputs.layout.chunk_of_byte]
    side = torch.where(outputs.bits, 1.0, -1.0)
    torch.testing.assert_close(seen["p"].grad, (seen["ds"] * s).sum(-1) * side)
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in student.router.parameters())
    weights = list(student.router.parameters())
    p = plain_p(student, outputs.r.detach(), row.cu_seqlens)
    expected = torch.autograd.grad(p, weights, seen["p"].grad)
    for parameter, value in zip(weights, expected, strict=True):
        torch.testing.assert_close(parameter.grad, value, rtol=1e-6, atol=1e-9)


def official_state(hidden: Tensor, p: Tensor, ends: Tensor, chunk_of_byte: Tensor, starts: Tensor) -> Tensor:
    """The EMA, one chunk after the other."""
    states: list[Tensor] = []
    for chunk in range(hidden.shape[0]):
        weight = p[ends[chunk]].clamp(1e-4, 1 - 1e-4)
        before = torch.zeros_like(hidden[0]) if bool(starts[chunk]) else states[-1]
        states.append(weight * hidden[chunk] + (1 - weight) * before)
    return torch.stack(states)[chunk_of_byte]


def test_in_official_mode_p_also_weighs_the_states() -> None:
    student, row = tiny_student(mode=DechunkMode.OFFICIAL).double(), padded_row()
    seen: dict[str, Tensor] = {}
    student.router.register_forward_hook(lambda module, args, p: (seen.update(p=p), p.retain_grad())[0])
    student.byte_decoder.input.register_full_backward_hook(lambda module, grads, out: seen.update(ds=grads[0]))
    outputs = student(row, Gold())
    (outputs.logits.sin() * row.is_real[:, None]).sum().backward()
    p = seen["p"].detach().requires_grad_()
    layout = outputs.layout
    s = official_state(outputs.hidden.detach(), p, layout.ends, layout.chunk_of_byte, layout.starts)
    # the factor's forward value is one and its gradient that of max(p, 1 − p)
    selected = torch.maximum(p, 1 - p)
    ((1 + selected - selected.detach())[:, None] * s).backward(seen["ds"])
    torch.testing.assert_close(seen["p"].grad, p.grad)
