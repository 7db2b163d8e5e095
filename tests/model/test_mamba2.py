"""The Mamba-2 block: initialisation, parameter layout, refusals."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from megabyte_distill.config.model import ByteMixer
from megabyte_distill.kernels import reference
from megabyte_distill.kernels.segments import Segments
from megabyte_distill.model.linears import PlainLinears
from megabyte_distill.model.mamba2 import Mamba2Block
from tests.model.byte_side import tiny_config

CONFIG = tiny_config(ByteMixer.MAMBA2)


def test_every_projection_is_a_tensor_of_its_own() -> None:
    names = {name for name, _ in Mamba2Block(CONFIG, 0, PlainLinears()).named_parameters()}
    linears = {f"{name}.weight" for name in ("z", "x", "b", "c", "dt", "out", "norm", "gated_norm")}
    convolutions = {f"conv_{name}_{kind}" for name in "xbc" for kind in ("weight", "bias")}
    assert names == linears | convolutions | {"dt_bias", "a_log", "d_skip"}


def test_initial_step_sizes_and_decay_rates_are_in_the_papers_ranges() -> None:
    block = Mamba2Block(replace(CONFIG, byte_width=256), 0, PlainLinears())
    dt, rates = F.softplus(block.dt_bias).detach(), block.a_log.detach().exp()
    assert 1e-3 * 0.99 <= float(dt.min()) <= float(dt.max()) <= 1e-1 * 1.01
    assert 1.0 * 0.99 <= float(rates.min()) <= float(rates.max()) <= 16.0 * 1.01
    assert bool((block.d_skip == 1).all())


def test_block_equals_the_layer_written_out() -> None:
    block = Mamba2Block(CONFIG, 0, PlainLinears()).double()
    x, cu_seqlens = torch.randn(20, 8, dtype=torch.float64), torch.tensor([0, 1, 20], dtype=torch.int32)
    normed = reference.rms_norm(x, block.norm.weight, 1e-5)

    def convolved(name: str) -> torch.Tensor:
        kernel, bias = getattr(block, f"conv_{name}_weight"), getattr(block, f"conv_{name}_bias")
        return F.silu(reference.segment_conv(getattr(block, name)(normed), kernel, bias, cu_seqlens))

    inputs = convolved("x").view(20, 4, 4)
    dt = F.softplus(block.dt(normed) + block.dt_bias)
    y = reference.ssm_scan(inputs, dt, -block.a_log.exp(), convolved("b"), convolved("c"), cu_seqlens)
    y = (y + block.d_skip[:, None] * inputs).reshape(20, 16) * F.silu(block.z(normed))
    expected = x + block.out(reference.rms_norm(y, block.gated_norm.weight, 1e-5))
    torch.testing.assert_close(block(x, Segments(cu_seqlens, 20)), expected)


def test_a_head_width_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="mamba_head_dim"):
        Mamba2Block(replace(CONFIG, mamba_head_dim=5), 0, PlainLinears())
