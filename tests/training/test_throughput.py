"""Counted operations are those of the formulas, and reach the log line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from megabyte_distill.training.throughput import FlopCount, packed_product_flops
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
