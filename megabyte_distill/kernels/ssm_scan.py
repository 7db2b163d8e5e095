"""Mamba-2's selective scan over a packed row, in blocks (the state-space duality form).

Inside a block the scan is a masked matrix product; between blocks the states are passed on one by one. A segment's
first byte starts from the zero state whatever stands before it in the row.

Shapes: C blocks of Q bytes, H heads of F features, N the state size.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from megabyte_distill.kernels.dispatch import fused
from megabyte_distill.kernels.segments import ScanBlocks, Segments


def ssm_scan(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, segments: Segments, block: int) -> Tensor:
    """y_t = S_t c_t with S_t = exp(dt_t · a) S_{t−1} + dt_t · x_t b_tᵀ, S = 0 in front of every segment.

    Args:
        x: [P, H, F] inputs of H heads.
        dt: [P, H] step sizes, after the softplus.
        a: [H] negative.
        b, c: [P, N] input and output vectors, shared by all heads (one group).
        segments: of the P bytes.
        block: bytes a block holds; changes speed and rounding only.

    Returns:
        [P, H, F] in fp32 (fp64 where an input is fp64), also under autocast; in x's dtype where the kernels of
        mamba_ssm are in place.
    """
    run = fused("ssm_scan", x)
    if run is not None:
        scanned: Tensor = run(x, dt, a, b, c, segments, block)
        return scanned
    dtype = torch.promote_types(torch.promote_types(x.dtype, dt.dtype), torch.float32)
    length = x.shape[0]
    if length == 0:
        return x.to(dtype)
    size = max(1, min(block, length))
    with _full_precision(x.device.type):
        x, dt, b, c = (_block(value.to(dtype), size) for value in (x, dt, b, c))
        y = _scan_blocks(x, dt, b, c, a.to(dtype), segments.scan_blocks(size))
    return y.flatten(0, 1)[:length]


def _full_precision(device_type: str) -> contextlib.AbstractContextManager[object]:
    """No autocast; a device without any (meta, on which sizes are reckoned) has nothing to switch off."""
    has_autocast = torch.amp.is_autocast_available(device_type)
    return torch.autocast(device_type, enabled=False) if has_autocast else contextlib.nullcontext()


def _block(value: Tensor, size: int) -> Tensor:
    """[P, ..] -> [C, size, ..], zeros behind the end."""
    padding = -value.shape[0] % size
    if padding:
        value = F.pad(value, (0, 0) * (value.dim() - 1) + (0, padding))
    return value.view(-1, size, *value.shape[1:])


def _scan_blocks(x: Tensor, dt: Tensor, b: Tensor, c: Tensor, a: Tensor, masks: ScanBlocks) -> Tensor:
    """x [C, Q, H, F], dt [C, Q, H], b and c [C, Q, N], a [H] -> y [C, Q, H, F]."""
    count, size, heads, features = x.shape
    logs = (dt * a).cumsum(1)  # log of the decay since the block began, this byte's included
    x_dt = x * dt[..., None]
    similarity = torch.bmm(c, b.transpose(1, 2))
    inside: Tensor = _InsideBlocks.apply(  # type: ignore[no-untyped-call]
        logs.transpose(1, 2), similarity, x_dt.transpose(1, 2).contiguous(), masks.hidden
    )
    y = inside.transpose(1, 2)
    if count == 1:
        return y
    to_end = (logs[:, -1:] - logs).exp() * masks.to_end[..., None]
    # States lie as [C, N, H·F]: then no product on the way, forward or backward, needs a transposed copy.
    written = torch.bmm(b.transpose(1, 2), (x * (dt * to_end)[..., None]).view(count, size, -1))
    kept = (logs[:, -1].exp() * masks.carried[:, -1:]).repeat_interleave(features, dim=1)
    before: Tensor = _PassStates.apply(kept, written)  # type: ignore[no-untyped-call]
    read = torch.bmm(c, before).view(count, size, heads, features)
    since_start = logs.exp() * masks.carried[..., None]
    return torch.addcmul(y, read, since_start[..., None])


class _PassStates(torch.autograd.Function):
    """The state in front of each block: before_{j+1} = kept_j · before_j + written_j, before_0 = 0.

    One row is a whole state, so a step is large enough to be worth its call and nothing is copied or turned around.
    """

    @staticmethod
    def forward(ctx: Any, kept: Tensor, written: Tensor) -> Tensor:
        """kept [C, H·F], written [C, N, H·F] -> [C, N, H·F]; the last row of both is not read."""
        before = torch.empty_like(written)
        before[0].zero_()
        rows, factors, inputs = before.unbind(0), kept.unbind(0), written.unbind(0)
        for j in range(len(rows) - 1):
            torch.addcmul(inputs[j], rows[j], factors[j], out=rows[j + 1])
        ctx.save_for_backward(kept, before)
        return before

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        kept, before = ctx.saved_tensors
        grad_written = torch.empty_like(grad)
        grad_written[-1].zero_()
        rows, factors, inputs = grad_written.unbind(0), kept.unbind(0), grad.unbind(0)
        for j in range(len(rows) - 2, -1, -1):
            torch.addcmul(inputs[j + 1], rows[j + 1], factors[j + 1], out=rows[j])
        return (grad_written * before).sum(1), grad_written


class _InsideBlocks(torch.autograd.Function):
    """y_l = Σ_s exp(logs_l − logs_s) · similarity_ls · x_s over the visible s of a block, for each head.

    Written out because the [C, H, Q, Q] weights are what the scan's time goes into: one such tensor is kept, and the
    gradient of the logs comes from y and x (Σ_s dW·W = dy · y), which needs no pass over it.
    """

    @staticmethod
    def forward(ctx: Any, logs: Tensor, similarity: Tensor, x: Tensor, hidden: Tensor) -> Tensor:
        """logs [C, H, Q], similarity [C, Q, Q], x [C, H, Q, F], hidden [C, Q, Q] -> [C, H, Q, F]."""
        decay = logs[..., :, None] - logs[..., None, :]
        decay.masked_fill_(hidden[:, None], -torch.inf).exp_()
        y = torch.matmul(decay * similarity[:, None], x)
        ctx.save_for_backward(decay, similarity, x, y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        decay, similarity, x, y = ctx.saved_tensors
        grad = grad.contiguous()
        grad_x = torch.matmul((decay * similarity[:, None]).transpose(2, 3), grad)
        grad_logs = (grad * y).sum(-1) - (grad_x * x).sum(-1)
        grad_similarity = torch.matmul(grad, x.transpose(2, 3)).mul_(decay).sum(1)
        return grad_logs, grad_similarity, grad_x, None
