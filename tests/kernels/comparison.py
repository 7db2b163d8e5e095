"""Compares a fused operator, values and every gradient, with its definition in fp64; one table of tolerances."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

FP32_TOLERANCE = 1e-5
"""Largest error over the largest number of a result, for fp32 inputs."""
BF16_VALUES, BF16_GRADIENTS = 2.0, 3.0
"""How much more error bf16 may have than the definition carried out in bf16 itself."""
BF16_FLOOR = 2.0**-9
"""Relative error of one rounding, allowed whatever the definition in bf16 happens to reach."""

Operator = Callable[..., Tensor]


def values_and_gradients(run: Operator, leaves: Sequence[Tensor | None], upstream: Tensor) -> list[Tensor]:
    """[result, a gradient for every floating leaf that is there]; a leaf without gradient counts as zeros."""
    own = [None if leaf is None else leaf.detach().clone().requires_grad_() for leaf in leaves]
    result = run(*own)
    present = [leaf for leaf in own if leaf is not None]
    if result.requires_grad:
        found = torch.autograd.grad(result, present, upstream.to(result.dtype), allow_unused=True)
    else:
        found = (None,) * len(present)
    grads = [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(present, found, strict=True)]
    return [result.detach(), *grads]


def assert_agrees(run: Operator, definition: Operator, leaves: Sequence[Tensor | None], upstream: Tensor) -> None:
    """Fused ``run`` against ``definition``: both take the leaves, fp32 or bf16; ``upstream`` is the result's gradient.

    With a bf16 leaf the yardstick is the error of the definition carried out in the leaves' own dtypes.
    """
    low = any(leaf is not None and leaf.dtype is torch.bfloat16 for leaf in leaves)
    got = values_and_gradients(run, leaves, upstream)
    wide = [None if leaf is None else leaf.double() for leaf in leaves]
    expected = values_and_gradients(definition, wide, upstream.to(got[0].dtype))
    naive = values_and_gradients(definition, leaves, upstream) if low else None
    for place, (mine, truth) in enumerate(zip(got, expected, strict=True)):
        what = f"gradient {place - 1}" if place else "the result"
        assert mine.shape == truth.shape, f"{what}: shape {tuple(mine.shape)}, expected {tuple(truth.shape)}"
        assert bool(mine.isfinite().all()), f"{what}: {int((~mine.isfinite()).sum())} of {mine.numel()} not finite"
        if naive is None:
            assert_close(mine, truth, FP32_TOLERANCE * float(truth.abs().max()) if truth.numel() else 0.0, what)
            continue
        allowed = (BF16_GRADIENTS if place else BF16_VALUES) * error(naive[place], truth) + BF16_FLOOR * norm(truth)
        assert error(mine, truth) <= allowed, f"{what}: error {error(mine, truth):.3g}, allowed {allowed:.3g}"


def assert_close(mine: Tensor, truth: Tensor, atol: float, what: str) -> None:
    """Elementwise; the message shows where the first differences are."""
    wrong = ((mine.double() - truth).abs() > atol).nonzero()
    if len(wrong):
        first = [(tuple(at.tolist()), float(mine[tuple(at)]), float(truth[tuple(at)])) for at in wrong[:3]]
        raise AssertionError(f"{what}: {len(wrong)} of {mine.numel()} differ by more than {atol:.3g}: {first}")


def error(mine: Tensor, truth: Tensor) -> float:
    return norm(mine.double() - truth)


def norm(x: Tensor) -> float:
    return float(x.double().norm())


def assert_same_in_any_order(library: object, run: Callable[[], list[Tensor]]) -> None:
    """The results are equal bit by bit whatever order lanes, warps and blocks run in."""
    expected = run()
    for order in (1, 7, 11):
        with library.order(order):  # type: ignore[attr-defined]
            for place, (mine, other) in enumerate(zip(run(), expected, strict=True)):
                assert torch.equal(mine, other), f"result {place} depends on the order of threads (order {order})"


def assert_registered_well(op: Callable[..., object], arguments: tuple[object, ...]) -> None:
    """torch's own checks of an operator: schema, autograd, shapes without data, and compilation with autograd."""
    torch.library.opcheck(op, arguments)
