"""Which implementation an operator of ``ops`` runs: its own torch body, or a fused one that was put in its place.

Nothing is put in place by importing this: ``selection.choose`` does it once, where a run begins.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class FusedOp:
    """A fused implementation with the signature of the operator it replaces."""

    run: Callable[..., Any]
    refusal: Callable[..., str | None]
    """Takes the operator's tensors; why they cannot be run, as "got …, expected …", or None."""
    limits: str
    """What it takes, in words; everything else goes to torch, or is an error where fused kernels were demanded."""
    is_ours: bool = True
    """Whether ``strict`` is about it: a package that a user happens to have must not turn a run into an error."""


class _Installed:
    """What is in place in this process."""

    ops: Mapping[str, FusedOp] = {}
    device = ""
    strict = False


def install(ops: Mapping[str, FusedOp], *, device: str = "", strict: bool = False) -> None:
    """Put ``ops`` (operator's name → implementation) in place for tensors on ``device``; an empty mapping removes all.

    With ``strict`` a call that the fused op refuses is a ValueError instead of one for the torch body.
    """
    _Installed.ops, _Installed.device, _Installed.strict = dict(ops), device, strict


def fused(name: str, *tensors: torch.Tensor | None) -> Callable[..., Any] | None:
    """The fused implementation that takes these tensors, or None for the torch body.

    Raises:
        ValueError: where the fused op was demanded and cannot run.
    """
    op = _Installed.ops.get(name)
    if op is None:
        return None
    first = next(tensor for tensor in tensors if tensor is not None)
    reason = (
        f"got tensors on {first.device.type}, expected {_Installed.device}"
        if first.device.type != _Installed.device
        else op.refusal(*tensors)
    )
    if reason is None:
        return op.run
    if _Installed.strict and op.is_ours:
        raise ValueError(f"--kernels fused: the fused {name} cannot run: {reason}; use --kernels auto or reference")
    return None
