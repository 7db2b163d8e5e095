"""The Mamba-2 block (arXiv 2405.21060) with one group, every projection a tensor of its own."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megabyte_distill.config.model import ByteSideConfig
from megabyte_distill.kernels.ops import accumulation_dtype, segment_conv, ssm_scan
from megabyte_distill.kernels.segments import Segments
from megabyte_distill.model.byte_mixer import ByteMixerBlock
from megabyte_distill.model.linears import LinearFactory
from megabyte_distill.model.normalization import RMSNorm, SharedRMSNorm
from megabyte_distill.model.row_state import RowState, window_after

_DT_MIN, _DT_MAX, _DT_FLOOR = 1e-3, 1e-1, 1e-4
_A_MIN, _A_MAX = 1.0, 16.0


@dataclass(frozen=True, slots=True)
class Mamba2State(RowState):
    """The last K − 1 inputs of each convolution and the state of each head."""

    conv_x: Tensor
    """[R, K−1, I], I the inner width."""
    conv_b: Tensor
    """[R, K−1, N]."""
    conv_c: Tensor
    """[R, K−1, N]."""
    ssm: Tensor
    """[R, H, I / H, N], fp32."""


@dataclass(frozen=True, slots=True)
class Mamba2Span:
    """A :class:`Span`: what each byte writes into the heads' states, and how fast it fades."""

    before: Mamba2State
    windows: tuple[Tensor, Tensor, Tensor]
    """[R, K−1 + T, ..] of the three convolutions."""
    logs: Tensor
    """[R, T, H], log of the decay from the beginning up to each byte."""
    x_dt: Tensor
    """[R, T, H, F]."""
    b: Tensor
    """[R, T, N]."""

    def after(self, counts: Tensor) -> Mamba2State:
        """The state behind the first ``counts`` [R] bytes."""
        kept = self.before.conv_x.shape[1]
        length = self.logs.shape[1]
        row = torch.arange(counts.shape[0], device=counts.device)
        until = self.logs[row, (counts - 1).clamp_min(0)].masked_fill((counts == 0)[:, None], 0.0)
        is_read = torch.arange(length, device=counts.device) < counts[:, None]
        weight = (until[:, None] - self.logs).masked_fill(~is_read[..., None], -torch.inf).exp()
        written = torch.einsum("rthf,rtn->rhfn", weight[..., None] * self.x_dt, self.b)
        x, b, c = (window_after(window, kept, counts) for window in self.windows)
        ssm = until.exp()[..., None, None] * self.before.ssm + written
        return Mamba2State(conv_x=x, conv_b=b, conv_c=c, ssm=ssm)


class Mamba2Block(ByteMixerBlock):
    """x + out(norm(y · silu(z))), y the selective scan of convolved x, b, c plus d_skip · x."""

    def __init__(self, config: ByteSideConfig, layer: int, linears: LinearFactory) -> None:
        super().__init__()
        width, state, taps = config.byte_width, config.mamba_state_dim, config.mamba_conv_kernel
        inner = config.mamba_expand * width
        if inner % config.mamba_head_dim:
            raise ValueError(
                f"mamba_expand · byte_width = {inner} is not a multiple of mamba_head_dim = {config.mamba_head_dim}; "
                "change one of them"
            )
        heads = inner // config.mamba_head_dim
        if heads % linears.shards:
            raise ValueError(f"{heads} Mamba-2 heads cannot be split over {linears.shards} tensor-parallel ranks")
        self.head_dim, self.scan_block = config.mamba_head_dim, config.mamba_scan_chunk
        self.norm = RMSNorm(width, config.norm_eps)
        self.z = linears.column(width, inner)
        self.x = linears.column(width, inner)
        self.b = linears.replicated(width, state)
        self.c = linears.replicated(width, state)
        self.dt = linears.column(width, heads)
        self.out = linears.row(inner, width)
        self.conv_x_weight, self.conv_x_bias = map(linears.cut, _conv_numbers(inner, taps))
        self.conv_b_weight, self.conv_b_bias = map(nn.Parameter, _conv_numbers(state, taps))
        self.conv_c_weight, self.conv_c_bias = map(nn.Parameter, _conv_numbers(state, taps))
        self.dt_bias = linears.cut(_initial_dt_bias(heads))
        self.a_log = linears.cut(torch.empty(heads).uniform_(_A_MIN, _A_MAX).log())
        self.d_skip = linears.cut(torch.ones(heads))
        self.gated_norm = SharedRMSNorm(inner, config.norm_eps, linears)
        self._linears = linears

    def forward(self, x: Tensor, segments: Segments) -> Tensor:
        """[P, D] -> [P, D]."""
        normed = self.norm(x)
        inputs = F.silu(segment_conv(self.x(normed), self.conv_x_weight, self.conv_x_bias, segments))
        b = F.silu(segment_conv(self.b(normed), self.conv_b_weight, self.conv_b_bias, segments))
        c = F.silu(segment_conv(self.c(normed), self.conv_c_weight, self.conv_c_bias, segments))
        b, c = self._linears.enter(b), self._linears.enter(c)  # every rank's heads read all of them
        by_head = inputs.view(*inputs.shape[:-1], self.d_skip.shape[0], self.head_dim)
        y = ssm_scan(by_head, self._step_sizes(normed), self._decay_rates(), b, c, segments, self.scan_block)
        return x + self._finish(y, by_head, self.z(normed))

    def init_state(self, rows: int, device: torch.device) -> Mamba2State:
        """Zeros: nothing stands in front of a segment."""
        taps = self.conv_x_weight.shape[1] - 1
        inner, state = self.conv_x_weight.shape[0], self.conv_b_weight.shape[0]
        dtype = self.conv_x_weight.dtype
        return Mamba2State(
            conv_x=torch.zeros(rows, taps, inner, device=device, dtype=dtype),
            conv_b=torch.zeros(rows, taps, state, device=device, dtype=dtype),
            conv_c=torch.zeros(rows, taps, state, device=device, dtype=dtype),
            ssm=torch.zeros(
                rows, inner // self.head_dim, self.head_dim, state, device=device, dtype=accumulation_dtype(dtype)
            ),
        )

    def steps(self, x: Tensor, state: Mamba2State) -> tuple[Tensor, Mamba2Span]:
        """The next T bytes of each row at once: [R, T, D] -> ([R, T, D], how the state goes on)."""
        normed = self.norm(x)
        inputs, window_x = _conv_steps(self.x(normed), state.conv_x, self.conv_x_weight, self.conv_x_bias)
        b, window_b = _conv_steps(self.b(normed), state.conv_b, self.conv_b_weight, self.conv_b_bias)
        c, window_c = _conv_steps(self.c(normed), state.conv_c, self.conv_c_weight, self.conv_c_bias)
        by_head = inputs.view(*inputs.shape[:-1], self.d_skip.shape[0], self.head_dim)
        dt = self._step_sizes(normed)
        b, c, x_dt = b.to(dt.dtype), c.to(dt.dtype), dt[..., None] * by_head.to(dt.dtype)
        logs = (dt * self._decay_rates()).cumsum(1)
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        fading = (logs[:, :, None] - logs[:, None]).masked_fill(later[..., None], -torch.inf).exp()  # [R, T, T, H]
        weights = (fading * torch.bmm(c, b.transpose(1, 2))[..., None]).permute(0, 3, 1, 2)
        y = torch.matmul(weights, x_dt.transpose(1, 2)).transpose(1, 2)
        y = y + logs.exp()[..., None] * torch.einsum("rhfn,rtn->rthf", state.ssm, c)
        span = Mamba2Span(before=state, windows=(window_x, window_b, window_c), logs=logs, x_dt=x_dt, b=b)
        return x + self._finish(y, by_head, self.z(normed)), span

    def step(self, x: Tensor, state: Mamba2State) -> tuple[Tensor, Mamba2State]:
        """One byte of each row: [R, D] -> ([R, D], the next state)."""
        normed = self.norm(x)
        inputs, conv_x = _conv_step(self.x(normed), state.conv_x, self.conv_x_weight, self.conv_x_bias)
        b, conv_b = _conv_step(self.b(normed), state.conv_b, self.conv_b_weight, self.conv_b_bias)
        c, conv_c = _conv_step(self.c(normed), state.conv_c, self.conv_c_weight, self.conv_c_bias)
        by_head = inputs.view(*inputs.shape[:-1], self.d_skip.shape[0], self.head_dim)
        dt = self._step_sizes(normed)
        written = torch.einsum("rhf,rn->rhfn", dt[..., None] * by_head.to(dt.dtype), b.to(dt.dtype))
        ssm = (dt * self._decay_rates()).exp()[..., None, None] * state.ssm + written
        y = torch.einsum("rhfn,rn->rhf", ssm, c.to(ssm.dtype))
        result = x + self._finish(y, by_head, self.z(normed))
        return result, Mamba2State(conv_x=conv_x, conv_b=conv_b, conv_c=conv_c, ssm=ssm)

    def _step_sizes(self, normed: Tensor) -> Tensor:
        """dt [.., H] in fp32: a bf16 step size would move every later state."""
        raw: Tensor = self.dt(normed)
        dtype = accumulation_dtype(raw.dtype)
        return F.softplus(raw.to(dtype) + self.dt_bias.to(dtype))

    def _decay_rates(self) -> Tensor:
        """A [H], negative, fp32."""
        return -self.a_log.to(accumulation_dtype(self.a_log.dtype)).exp()

    def _finish(self, y: Tensor, by_head: Tensor, z: Tensor) -> Tensor:
        """Skip, gate, norm over the whole inner width, projection; y [.., H, I / H] -> [.., D]."""
        y = torch.addcmul(y, by_head.to(y.dtype), self.d_skip.to(y.dtype)[:, None]).flatten(-2)
        gated = y * F.silu(z.to(y.dtype))
        result: Tensor = self.out(self.gated_norm(gated))
        return result


def _conv_numbers(channels: int, taps: int) -> tuple[Tensor, Tensor]:
    """Weight [channels, taps] and bias [channels], drawn as PyTorch draws a depthwise convolution's."""
    bound = 1.0 / math.sqrt(taps)
    return torch.empty(channels, taps).uniform_(-bound, bound), torch.empty(channels).uniform_(-bound, bound)


def _initial_dt_bias(heads: int) -> Tensor:
    """[heads] biases whose softplus is log-uniform in [1e-3, 1e-1]."""
    dt = torch.empty(heads).uniform_(math.log(_DT_MIN), math.log(_DT_MAX)).exp().clamp_min(_DT_FLOOR)
    return dt + torch.log(-torch.expm1(-dt))


def _conv_step(x: Tensor, past: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """silu(convolution) at one byte: x [R, C], past [R, K−1, C] -> ([R, C], the next past)."""
    window = torch.cat((past, x[:, None].to(past.dtype)), dim=1)
    return F.silu((window * weight.t()).sum(1) + bias), window[:, 1:]


def _conv_steps(x: Tensor, past: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """silu(convolution) at T bytes: x [R, T, C], past [R, K−1, C] -> ([R, T, C], past and x [R, K−1 + T, C])."""
    window = torch.cat((past, x.to(past.dtype)), dim=1)
    return F.silu((window.unfold(1, weight.shape[1], 1) * weight).sum(-1) + bias), window
