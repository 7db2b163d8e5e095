#!/usr/bin/env python3
"""The scan by mamba_ssm's kernels against our own, their Triton sources interpreted on a CPU: values and gradients.

    python scripts/check_mamba_scan.py FOLDER...

FOLDERs go on the module path and hold mamba_ssm's Python sources (compiled extensions are not needed: an empty
mamba_ssm/__init__.py and mamba_ssm/ops/__init__.py will do), triton and einops.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import types
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megabyte_distill.tool import Failure, ToolParser, run_tool

LENGTHS = (63, 1, 40, 26)
HEADS, FEATURES, STATE = 2, 16, 16
ALLOWED = 2e-4
"""fp32 sums in another order; the decay rates' gradient is a difference of large sums."""


def build_parser() -> ToolParser:
    """The command line."""
    parser = ToolParser(description=__doc__, failure="the two scans differ")
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="put on the module path")
    return parser


def run(options: argparse.Namespace) -> None:
    """A line a tensor; Failure where one differs."""
    os.environ.update(TRITON_INTERPRET="1", MAMBA_DETERMINISTIC="1")  # the latter: no autotuning, which needs a GPU
    sys.path[1:1] = options.folders
    import torch  # after the environment is set

    from megabyte_distill.kernels.fused import mamba_scan
    from megabyte_distill.kernels.segments import Segments
    from megabyte_distill.kernels.ssm_scan import ssm_scan

    # what the kernels' launchers ask of a device before they launch
    torch.cuda.device = lambda *_: contextlib.nullcontext()  # type: ignore[assignment,misc]
    torch.cuda.get_device_properties = lambda *_: types.SimpleNamespace(multi_processor_count=8)  # type: ignore[assignment]
    if not mamba_scan.is_usable():
        raise ValueError(f"mamba_ssm cannot be imported from {' '.join(options.folders)}")
    torch.manual_seed(0)
    size = sum(LENGTHS)
    values = [
        torch.randn(size, HEADS, FEATURES),
        torch.rand(size, HEADS) * 0.1 + 1e-3,
        -torch.rand(HEADS) * 15 - 1,
        torch.randn(size, STATE) / 2,
        torch.randn(size, STATE) / 2,
    ]
    for value in values:
        value.requires_grad_()
    edges = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32)
    segments = Segments(edges, size)
    wanted, got = ssm_scan(*values, segments, 64), mamba_scan.mamba_scan(*values, segments, 64)
    upstream = torch.randn_like(wanted)
    pairs = {"y": (wanted, got)}
    theirs, ours = torch.autograd.grad(wanted, values, upstream), torch.autograd.grad(got, values, upstream)
    pairs |= {f"d{name}": pair for name, *pair in zip(("x", "dt", "a", "b", "c"), theirs, ours, strict=True)}  # type: ignore[misc]
    worst = 0.0
    for name, (one, other) in pairs.items():
        error = float((one - other).detach().norm() / one.detach().norm())
        worst = max(worst, error)
        print(f"{name:4} relative error {error:.1e}")
    if worst > ALLOWED:
        raise Failure(f"a relative error of {worst:.1e} is above {ALLOWED:.0e}")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_tool(build_parser(), run, argv)


if __name__ == "__main__":
    raise SystemExit(main())
