#!/usr/bin/env python3
"""Layers of a published backbone, forward and backward: megatron-core's, Transformer Engine's, and its FP8 recipes.

    python benchmarks/backbone_speed.py [--preset olmo2-1b] [--layers 4] [--chunks 16384]

Random weights, packed segments of 4,096 chunks on average, bf16. "trained" takes all gradients, as 1b, 2b and 3a do;
"frozen" only that of the states, as 2a does. What the local layers (megatron-core's, with this package's rotation and
attention, nothing fused across them) take over what the others take is the figure; ways that cannot run here are named
with the reason. Times are between two events on the device, the wait for the segments' lengths included. --quick:
small, anywhere. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]
warnings.simplefilter("ignore")

from benchmarks.gpu_check import milliseconds  # noqa: E402 - after the path is set
from benchmarks.gpu_training import TINY, draw  # noqa: E402
from benchmarks.kernel_cases import segment_offsets  # noqa: E402
from megabyte_distill import optional  # noqa: E402
from megabyte_distill.config.engine import EngineConfig, Fp8Format, Fp8Recipe, TransformerImpl  # noqa: E402
from megabyte_distill.config.model import BackboneConfig  # noqa: E402
from megabyte_distill.config.published import PUBLISHED_BACKBONES  # noqa: E402
from megabyte_distill.model.backbone import Backbone, transformer_config  # noqa: E402
from megabyte_distill.model.engine_layers import requantize_weights  # noqa: E402
from megabyte_distill.parallel.process_groups import world  # noqa: E402
from megabyte_distill.pretrain.engine_limits import device_problems  # noqa: E402

LOCAL = "local (megatron-core), bf16"


def ways() -> dict[str, EngineConfig]:
    """Name → what computes the layers."""
    engine = EngineConfig(transformer_impl=TransformerImpl.TRANSFORMER_ENGINE)
    return {
        LOCAL: EngineConfig(),
        "Transformer Engine, bf16": engine,
        **{
            f"Transformer Engine, FP8 {recipe.value}": replace(engine, fp8_format=Fp8Format.HYBRID, fp8_recipe=recipe)
            for recipe in Fp8Recipe
        },
    }


def problems(engine: EngineConfig, chunks: int, device: torch.device) -> Iterator[str]:
    """Why it cannot run here."""
    if chunks % engine.chunk_multiple:
        yield f"takes multiples of {engine.chunk_multiple} chunks, got {chunks:,}"
    if engine.transformer_impl is TransformerImpl.LOCAL:
        return
    if device.type != "cuda":
        yield "needs a GPU"
    elif (why := optional.engine_problem()) is not None:
        yield f"transformer_engine {why}"
    elif engine.fp8_format is not None:
        yield from device_problems(engine.fp8_recipe, torch.cuda.get_device_capability(device))


def measure(config: BackboneConfig, engine: EngineConfig, offsets: torch.Tensor) -> dict[str, float]:
    """Milliseconds of a forward and backward pass of the segments between ``offsets``, trained and frozen."""
    device = offsets.device
    transformer = transformer_config(config, **engine.transformer_fields, perform_initialization=False)
    backbone = Backbone(config, transformer).to(device, torch.bfloat16)
    draw(backbone)
    x = torch.randn(int(offsets[-1]), config.hidden_size, device=device, dtype=torch.bfloat16).requires_grad_()
    upstream = torch.randn_like(x)

    def both() -> None:
        requantize_weights(backbone)
        backbone(x, offsets).backward(upstream)
        x.grad = None
        backbone.zero_grad(set_to_none=True)

    found = {}
    for kind in ("trained", "frozen"):
        backbone.requires_grad_(kind == "trained")
        found[kind] = milliseconds(both, device)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--preset", default="olmo2-1b", choices=PUBLISHED_BACKBONES, help="a published model")
    parser.add_argument("--layers", type=int, default=4, help="of them (4)")
    parser.add_argument("--chunks", type=int, default=16_384, help="of the packed row (16384)")
    parser.add_argument("--quick", action="store_true", help="a tiny model, under a minute on a CPU")
    asked = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = TINY if asked.quick else replace(PUBLISHED_BACKBONES[asked.preset], num_layers=asked.layers)
    chunks = 256 if asked.quick else asked.chunks
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    results: dict[str, object] = {"device": name, "chunks": chunks}
    print(f"{name}, {config.num_layers} layers of {'TINY' if asked.quick else asked.preset}, {chunks:,} chunks")
    print(f"{'':36}{'trained, ms':>14}{'x as fast':>11}{'frozen, ms':>14}{'x as fast':>11}")
    torch.manual_seed(1)
    offsets = segment_offsets(chunks, device)
    with world():
        base: dict[str, float] = {}
        for way, engine in ways().items():
            why = next(problems(engine, chunks, device), None)
            if why is not None:
                print(f"{way:36}  {why}")
                results[way] = why
                continue
            found = measure(config, engine, offsets)
            base = base or found
            ratios = {kind: base[kind] / found[kind] for kind in found}
            print(f"{way:36}", *(f"{found[kind]:13.2f}{ratios[kind]:11.2f}" for kind in found), flush=True)
            results[way] = {"ms": found, "times_as_fast": ratios}
    print(json.dumps(results))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
