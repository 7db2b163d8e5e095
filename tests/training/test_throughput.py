"""Counted operations are those of the formulas, and reach the log line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megabyte_distill.training.throughput import (
    ENGINE,
    FlopCount,
    engine_attention_flops,
    engine_linear_flops,
    packed_product_flops,
)
from tests.pretrain.job import Job

ROWS, INPUTS, OUTPUTS = 7, 5, 3


def test_a_linear_layer_takes_two_products_more_in_its_backward() -> None:
    layer = nn.Linear(INPUTS, OUTPUTS)
    x = torch.randn(ROWS, INPUTS, requires_grad=True)
    product = 2 * ROWS * INPUTS * OUTPUTS
    with FlopCount() as count:
        y = layer(x)
        assert count.flops == product
        y.sum().backward()
    assert count.flops == 3 * product


@pytest.mark.parametrize("causal", [False, True])
def test_fused_attention_counts_its_products_half_where_it_is_causal(causal: bool) -> None:
    heads, length, width = 2, 16, 8
    query, key, value = (torch.randn(1, heads, length, width, requires_grad=True) for _ in range(3))
    square = 2 * heads * length * length * width
    with FlopCount() as count:
        out = F.scaled_dot_product_attention(query, key, value, is_causal=causal)
        assert count.flops == 2 * square // (2 if causal else 1)
        out.sum().backward()
    assert count.flops == 7 * square // (2 if causal else 1)


def test_attention_over_packed_segments_is_counted_segment_by_segment() -> None:
    heads, width, lengths = 2, 8, (5, 0, 11)
    edges = torch.tensor([0, 5, 5, 16], dtype=torch.int32)
    whole = sum(2 * heads * length * length * width for length in lengths)
    assert packed_product_flops(torch.empty(16, heads, width), edges) == whole // 2
    # eleven positions see at most four: the square of the seven that are out of reach falls away
    windowed = 2 * heads * width * (5 * 5 - 1 + 11 * 11 - 7 * 7)
    assert packed_product_flops(torch.empty(16, heads, width), edges, window=4) == windowed // 2


class OfTheEngine(nn.Linear):
    """Counted as a layer of Transformer Engine, beside its products, which torch sees here."""

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return super().forward(x), None


OfTheEngine.__module__ = ENGINE


@pytest.mark.parametrize("x_has_gradient", [False, True])
@pytest.mark.parametrize("is_frozen", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_an_engines_layer_counts_what_torch_counts_of_the_same_layer(
    x_has_gradient: bool, is_frozen: bool, grad: bool
) -> None:
    layer = OfTheEngine(INPUTS, OUTPUTS, bias=False).requires_grad_(not is_frozen)
    x = torch.randn(ROWS, 1, INPUTS, requires_grad=x_has_gradient)
    with FlopCount() as count, torch.set_grad_enabled(grad):
        out, _ = layer(x)
        if out.requires_grad:
            out.sum().backward()
    product = 2 * ROWS * INPUTS * OUTPUTS
    backward = (x_has_gradient + (not is_frozen)) if grad else 0
    # once by torch, once by layer
    assert count.flops == 2 * product * (1 + backward)
    with FlopCount() as after:
        nn.Linear(INPUTS, OUTPUTS)(x)
    assert after.flops == product


@pytest.mark.parametrize("gathers", [False, True])
def test_an_engines_layer_counts_whole_rows_under_sequence_parallelism(gathers: bool) -> None:
    weight = torch.empty(OUTPUTS, INPUTS)
    rows_in, rows_out = (4, 8) if gathers else (8, 4)
    x, out = torch.empty(rows_in, 1, INPUTS), torch.empty(rows_out, 1, OUTPUTS)
    assert engine_linear_flops(weight, x, out) == 2 * 8 * INPUTS * OUTPUTS


def test_an_engines_attention_counts_seven_products() -> None:
    query, edges = torch.randn(16, 2, 8, requires_grad=True), torch.tensor([0, 5, 16], dtype=torch.int32)
    once = packed_product_flops(query, edges)
    assert engine_attention_flops(query, edges, query.detach()) == 2 * once
    assert engine_attention_flops(query, edges, query) == 7 * once


def shown_throughput(text: str) -> list[float]:
    return [float(found) for found in re.findall(r"throughput per GPU \(TFLOP/s/GPU\): ([\d.e+-]+) \|", text)]


def test_the_log_line_shows_it_where_it_is_asked_for(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--stages", "1a", "--eval-iters", "0")
    assert job.run(tmp_path / "without", *flags) == 0
    assert not shown_throughput(capsys.readouterr().out)
    assert job.run(tmp_path / "with", *flags, "--log-throughput") == 0
    shown = shown_throughput(capsys.readouterr().out)
    assert len(shown) == 4 and all(0 < value < 100 for value in shown)


def test_longer_chunks_are_counted_anew(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--stages", "2a", "--eval-iters", "0", "--log-throughput", "--log-interval", "1")
    growing = ("--target-bytes-per-chunk", "16", "--target-bytes-per-chunk-iters", "3")
    assert job.run(tmp_path / "run", *flags, *growing) == 0
    printed = capsys.readouterr().out
    seconds = [float(found) / 1000 for found in re.findall(r"per iteration \(ms\): ([\d.]+) \|", printed)]
    tera = [rate * time for rate, time in zip(shown_throughput(printed), seconds, strict=True)]
    assert len(tera) == 4 and tera[1] < 0.98 * tera[0]
    assert tera[3] == pytest.approx(tera[2], rel=0.01)  # both at the target
