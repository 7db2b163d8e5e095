"""The convolutional mixer: its reach and its refusals."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megabyte_distill.config.model import ByteMixer
from megabyte_distill.kernels.segments import Segments
from megabyte_distill.model.conv_mixer import ConvMixerBlock
from megabyte_distill.model.linears import PlainLinears
from tests.model.byte_side import tiny_config

CONFIG = replace(tiny_config(ByteMixer.CONV), conv_dilations=(1, 3))


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_byte_reaches_exactly_its_taps(layer: int) -> None:
    block = ConvMixerBlock(CONFIG, layer, PlainLinears())
    dilation = (1, 3, 1)[layer]
    x, segments = torch.randn(20, 8), Segments(torch.tensor([0, 20]), 20)
    changed = x.clone()
    changed[5] += 1.0
    moved = (block(x, segments) != block(changed, segments)).any(-1).nonzero()[:, 0].tolist()
    assert moved == [5 + tap * dilation for tap in range(4)]


def test_no_dilations_are_refused() -> None:
    with pytest.raises(ValueError, match="conv_dilations"):
        ConvMixerBlock(replace(CONFIG, conv_dilations=()), 0, PlainLinears())
