#!/usr/bin/env python3
"""One layer's Mamba-2 scan, forward and backward, in bf16: torch's own operators against the kernels of mamba_ssm.

    python benchmarks/mamba_scan.py [--bytes 32768 --heads 48 --features 64 --state 128]

Where mamba_ssm is installed (its Triton sources and an empty mamba_ssm/__init__.py are enough) and a GPU is there. Runs
without mamba_ssm's tuning of its kernels, which takes minutes at the first call and makes them faster. Medians of
device time. --quick: small, anywhere, torch alone. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]
os.environ.setdefault("MAMBA_DETERMINISTIC", "1")

import torch  # noqa: E402 - after the path is set
from torch import Tensor  # noqa: E402

from benchmarks.gpu_check import milliseconds  # noqa: E402
from benchmarks.kernel_cases import segment_offsets  # noqa: E402
from megabyte_distill.kernels.fused import mamba_scan  # noqa: E402
from megabyte_distill.kernels.segments import Segments  # noqa: E402
from megabyte_distill.kernels.ssm_scan import ssm_scan  # noqa: E402

BLOCKS = (64, 128, 256)
"""Bytes (--mamba-scan-chunk)."""


def measure(run: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Milliseconds (the median) and, on a GPU, GiB beyond what was there."""
    run()
    if device.type != "cuda":
        return {"ms": milliseconds(run, device)}
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    return {"ms": milliseconds(run, device), "gib": (torch.cuda.max_memory_allocated() - before) / 2**30}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--bytes", type=int, default=32_768, help="of the packed row (32768)")
    parser.add_argument("--heads", type=int, default=48, help="twice the byte width over 64 (48: OLMo-2-1B's)")
    parser.add_argument("--features", type=int, default=64, help="of a head (64)")
    parser.add_argument("--state", type=int, default=128, help="the state's size (128)")
    parser.add_argument("--quick", action="store_true", help="small, under a minute on a CPU")
    asked = parser.parse_args(argv)
    size, heads = (512, 4) if asked.quick else (asked.bytes, asked.heads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(1)
    segments = Segments(segment_offsets(size, device), size)
    x = torch.randn(size, heads, asked.features, device=device).bfloat16()
    b, c = (torch.randn(size, asked.state, device=device).bfloat16() / asked.state**0.25 for _ in range(2))
    dt, a = torch.rand(size, heads, device=device) * 0.1 + 1e-3, -torch.rand(heads, device=device) * 15 - 1
    leaves = [value.requires_grad_() for value in (x, dt, a, b, c)]
    upstream = torch.randn(size, heads, asked.features, device=device)

    def both(scan: Callable[..., Tensor], block: int) -> Callable[[], object]:
        def run() -> object:
            y = scan(*leaves, segments, block)
            return torch.autograd.grad(y, leaves, upstream.to(y.dtype))

        return run

    scans: dict[str, Callable[..., Tensor]] = {"torch": ssm_scan}
    if device.type == "cuda" and mamba_scan.is_usable():
        scans["mamba_ssm"] = mamba_scan.mamba_scan
    results: dict[str, Any] = {"device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU"}
    for name, scan in scans.items():
        for block in BLOCKS:
            found = measure(both(scan, block), device)
            results[f"{name}_{block}"] = found
            print(f"{name:10} block {block:4}", *(f"{key} {value:8.2f}" for key, value in found.items()), flush=True)
    print(json.dumps(results))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
